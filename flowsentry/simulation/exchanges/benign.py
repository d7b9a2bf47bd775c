"""Benign life: who calls which service how often, with sizes and durations measured on a real cluster.

Rates, clustering (variance/mean per minute), sizes and durations are those of the benign flows of the February 2022
recording of the AssureMOSS dataset, by service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.simulation.exchanges import (
    DIRECT,
    EGRESS,
    NODE_PORT,
    SERVICE,
    TCP,
    UDP,
    Quantiles,
    answered,
    join,
    refused,
    sized,
    table,
)
from flowsentry.simulation.settings import SimulationSettings
from flowsentry.simulation.world import SECOND, Integers, Workload, World

CLIENTS: Final = "clients"
HOSTS: Final = "hosts"
LOAD_BLOCK: Final = 600 * SECOND
"""The load generator changes its pace every ten minutes."""


@dataclass(frozen=True)
class Service:
    """Calls of one service."""

    workload: str
    """Workload that serves; `hosts` for the world outside."""
    per_minute: float
    """Flows at scale 1, twins included."""
    clients: tuple[str, ...]
    """Workloads that call, in falling order of use; `clients` for the clients outside."""
    total: Quantiles
    milliseconds: Quantiles
    src_share: float
    dispersion: float = 1.0
    """Variance/mean of the flows per minute; below 1 the calls come with a fixed period."""
    nat: int = DIRECT
    twins: float = 0.0
    """Share of exchanges that are seen on both sides of the translation."""
    port: int | None = None
    """Port that is dialled, where it is not the workload's."""
    transport: int = TCP
    loaded: bool = False
    """The rate follows the pace of the load generator."""
    after: tuple[str, ...] = ()
    """Workloads whose answers cause `caused` of these calls: their pods are the clients."""
    caused: float = 0.0


PROBE = Quantiles(q05=0.063, q25=0.093, q50=0.127, q75=0.2, q95=1.2, q99=95)
WEB = Quantiles(q05=224, q25=1_131, q50=4_100, q75=16_000, q95=85_500, q99=280_000)
WEB_TIME = Quantiles(q05=0.12, q25=16, q50=4_400, q75=6_700, q95=27_800, q99=60_000)

SERVICES: Final = (
    Service("shop/web", 7.0, ("load/generator", "ops/jobs"), WEB, WEB_TIME, 0.2, 18, SERVICE, 0.25, loaded=True),
    Service("blog/joomla", 5.0, ("load/generator", "ops/jobs"), WEB, WEB_TIME, 0.2, 18, SERVICE, 0.25, loaded=True),
    Service("shop/web", 10.0, (CLIENTS,), WEB, WEB_TIME, 0.2, 12, NODE_PORT, 0.95, loaded=True),
    Service(
        "blog/mysql",
        9.8,
        ("blog/joomla",),
        Quantiles(q05=8_600, q25=37_000, q50=70_000, q75=147_000, q95=357_000, q99=1_820_000),
        Quantiles(q05=4, q25=193, q50=304, q75=635, q95=1_600, q99=3_290),
        0.2,
        9,
        after=("blog/joomla",),
        caused=0.5,
    ),
    Service(
        "shop/redis",
        7.8,
        ("shop/web", "ops/jobs", "shop/redis", "blog/joomla"),
        Quantiles(q05=390, q25=860, q50=1_180, q75=1_680, q95=2_700, q99=4_214),
        Quantiles(q05=0.23, q25=0.395, q50=0.58, q75=0.925, q95=100, q99=1_496),
        0.4,
        30,
        SERVICE,
        0.7,
        after=("shop/web",),
        caused=0.5,
    ),
    Service(
        "kube-system/coredns",
        32,
        (
            "shop/web",
            "blog/joomla",
            "ops/jobs",
            "shop/redis",
            "load/generator",
            "monitoring/scraper",
            "mesh/registry",
            "monitoring/dashboard",
            "blog/mysql",
            "ops/webhook",
            "storage/manager",
        ),
        Quantiles(q05=278, q25=530, q50=547, q75=549, q95=574, q99=606),
        Quantiles(q05=0.094, q25=0.14, q50=0.203, q75=0.346, q95=60, q99=103),
        0.35,
        45,
        SERVICE,
        0.95,
        transport=UDP,
        after=("shop/web", "blog/joomla"),
        caused=0.3,
    ),
    Service(
        HOSTS,
        4.5,
        ("ops/jobs", "blog/joomla", "shop/web", "ops/webhook", "shop/redis", "monitoring/index", "blog/mysql"),
        Quantiles(q05=760, q25=4_094, q50=4_580, q75=7_326, q95=19_100, q99=3_870_000),
        Quantiles(q05=0.36, q25=0.85, q50=2, q75=94, q95=700, q99=60_000),
        0.2,
        10.5,
        EGRESS,
        0.3,
        port=443,
    ),
    Service(
        "kube-system/api",
        2.5,
        ("kube-system/coredns", "ops/webhook", "monitoring/scraper", "ops/jobs", "storage/manager"),
        Quantiles(q05=760, q25=4_094, q50=4_600, q75=7_326, q95=19_100, q99=3_800_000),
        Quantiles(q05=0.36, q25=0.85, q50=2, q75=94, q95=700, q99=60_000),
        0.3,
        4,
        SERVICE,
        0.02,
        port=443,
    ),
    Service(
        "kube-system/api",
        0.5,
        ("nodes/kubelet", "monitoring/scraper"),
        Quantiles(q05=823, q50=22_000, q95=398_000, q99=2_900_000),
        Quantiles(q05=1.6, q50=500, q95=91_400, q99=900_000),
        0.3,
        6.6,
    ),
    Service(
        "monitoring/dashboard",
        5.6,
        ("nodes/kubelet", "monitoring/scraper", "ops/jobs"),
        Quantiles(q05=4_120, q25=65_000, q50=116_000, q75=120_000, q95=130_100, q99=130_900),
        Quantiles(q05=0.41, q25=2.4, q50=65, q75=129, q95=499, q99=74_900),
        0.05,
        0.6,
    ),
    Service(
        "nodes/kubelet",
        1.7,
        ("monitoring/scraper",),
        Quantiles(q05=720, q25=97_000, q50=200_000, q75=481_000, q95=780_000, q99=1_150_000),
        Quantiles(q05=300, q25=75_000, q50=109_000, q75=289_000, q95=498_000, q99=1_200_000),
        0.1,
        2.5,
    ),
    Service(
        "ops/ssh",
        1.4,
        (CLIENTS,),
        Quantiles(q05=1_060, q25=7_300, q50=10_550, q75=16_168, q95=48_500, q99=64_000),
        Quantiles(q05=0.31, q25=3_677, q50=11_300, q75=34_500, q95=59_800, q99=93_000),
        0.4,
        1.8,
        NODE_PORT,
        1.0,
    ),
    Service(
        "monitoring/index",
        0.5,
        ("monitoring/dashboard", "monitoring/scraper", "ops/jobs"),
        Quantiles(q05=915, q25=4_700, q50=6_214, q75=38_700, q95=713_000, q99=5_000_000),
        Quantiles(q05=0.3, q25=2.8, q50=158, q75=60_000, q95=496_000, q99=1_800_000),
        0.6,
        4,
    ),
    Service(
        "monitoring/index",
        0.15,
        ("monitoring/index",),
        Quantiles(q05=530, q25=3_000, q50=20_000, q75=1_036_000, q95=7_100_000, q99=58_000_000),
        Quantiles(q05=1, q25=2_885, q50=79_000, q75=400_000, q95=1_400_000, q99=2_000_000),
        0.5,
        2,
        port=9300,
    ),
    Service(
        "ops/webhook",
        3.0,
        ("nodes/kubelet", "ops/jobs", "monitoring/scraper"),
        Quantiles(q05=700, q50=3_400, q95=12_000),
        Quantiles(q05=0.8, q50=3.1, q95=80),
        0.5,
        3,
        SERVICE,
        0.4,
    ),
)


def everyday(settings: SimulationSettings, world: World, rng: np.random.Generator) -> pd.DataFrame:
    """All benign exchanges of a recording without trouble, by service and then by time."""
    minutes = settings.minutes
    blocks = -(-minutes * 60 * SECOND // LOAD_BLOCK)
    load = rng.gamma(2.0, 0.5, blocks)
    load = load / load.mean()
    done: list[pd.DataFrame] = []
    for service in SERVICES:
        causes = [
            one[one["server"].isin(pods) & one["server_port"].eq(80)]
            for workload in service.after
            for pods in (world.workloads[workload].pods.ravel(),)
            for one in done[:3]
        ]
        done.append(_calls(service, settings, world, load, join(causes), rng))
    done += [_registry(settings, world, rng), _storage(settings, world, rng), _agents(settings, world, rng)]
    return join(done)


def _calls(
    service: Service,
    settings: SimulationSettings,
    world: World,
    load: np.ndarray,
    causes: pd.DataFrame,
    rng: np.random.Generator,
) -> pd.DataFrame:
    per_exchange = 1 + service.twins
    rate = service.per_minute / per_exchange * settings.scale
    caused = rng.poisson(rate * service.caused * settings.minutes) if len(causes) else 0
    own = rate * (1 - service.caused) if len(causes) else rate
    if service.dispersion < 1:
        start = _periodic(own, settings.minutes, rng)
    else:
        lam = np.full(settings.minutes, own)
        excess = service.dispersion / per_exchange - 1
        if service.loaded:
            lam *= load[np.arange(settings.minutes) * 60 * SECOND // LOAD_BLOCK]
            excess -= own / settings.scale * load.var()
        if excess > 0:
            shape = service.per_minute / per_exchange / excess
            lam *= rng.gamma(shape, 1 / shape, settings.minutes)
        counts = rng.poisson(lam)
        minute = np.repeat(np.arange(settings.minutes), counts)
        start = minute * 60 * SECOND + rng.integers(0, 60 * SECOND, len(minute))
    client = choose(service.clients, start, world, rng)
    if caused:
        parent = np.sort(rng.integers(0, len(causes), caused))
        delay = np.rint(rng.lognormal(np.log(0.004), 1.0, caused) * SECOND).astype(np.int64)
        start = np.concatenate([start, causes["start"].to_numpy()[parent] + delay])
        client = np.concatenate([client, causes["server"].to_numpy()[parent]])
    kept = start < settings.minutes * 60 * SECOND
    start, client = start[kept], client[kept]
    n = len(start)
    if service.workload == HOSTS:
        server = dialled = world.hosts[_falling(len(world.hosts), n, rng)]
        port = server_port = np.full(n, service.port)
    else:
        dialled, port, server, server_port = route(
            world, world.workloads[service.workload], service.nat, service.port, start, rng
        )
    return table(
        n,
        client=client,
        dialled=dialled,
        port=port,
        server=server,
        server_port=server_port,
        transport=service.transport,
        nat=service.nat,
        start=start,
        seen_twice=rng.random(n) < service.twins,
        **answered(
            rng, n, service.total, service.milliseconds, src_share=service.src_share, transport=service.transport
        ),
    )


def route(
    world: World, workload: Workload, nat: int, port: int | None, start: Integers, rng: np.random.Generator
) -> tuple[Integers, Integers, Integers, Integers]:
    """What is dialled (address, port) and who serves behind it (address, port), for each start."""
    n = len(start)
    server = workload.at(rng.integers(0, workload.replicas, n), start)
    own = workload.port if port is None or nat != DIRECT else port
    server_port = np.full(n, own)
    if nat == SERVICE:
        return np.full(n, workload.service), np.full(n, port or own), server, server_port
    if nat == NODE_PORT:
        return world.nodes[rng.integers(0, len(world.nodes), n)], np.full(n, workload.node_port), server, server_port
    return server, server_port, server, server_port


def choose(names: tuple[str, ...], start: Integers, world: World, rng: np.random.Generator) -> Integers:
    """Clients at the given times, of workloads (or the world outside) in falling order of use."""
    if names == (CLIENTS,):
        return world.clients[_falling(len(world.clients), len(start), rng)]
    which = _falling(len(names), len(start), rng)
    client = np.zeros(len(start), np.int64)
    for number, name in enumerate(names):
        workload = world.workloads[name]
        replica = rng.integers(0, workload.replicas, len(start))
        client = np.where(which == number, workload.at(replica, start), client)
    return client


def _falling(kinds: int, n: int, rng: np.random.Generator) -> Integers:
    """Numbers 0..kinds-1, each less frequent than the one before (Zipf)."""
    weight = 1 / np.arange(1, kinds + 1)
    return rng.choice(kinds, n, p=weight / weight.sum())


def _periodic(per_minute: float, minutes: int, rng: np.random.Generator) -> Integers:
    """Times at a fixed period with a jitter of a tenth of it."""
    period = 60 * SECOND / per_minute
    n = int(minutes * per_minute)
    times = (np.arange(n) + rng.random() * 0.8 + 0.1 * rng.random(n)) * period
    return np.rint(times).astype(np.int64)


def _probes(
    settings: SimulationSettings, world: World, workload: str, per_minute: float, rng: np.random.Generator
) -> tuple[Integers, Integers, Integers]:
    """Client node, pod and start of the probes of every replica by its node, at a constant rate."""
    target = world.workloads[workload]
    starts = [
        _periodic(per_minute * settings.scale / target.replicas, settings.minutes, rng) for _ in range(target.replicas)
    ]
    replica = np.repeat(np.arange(target.replicas), [len(one) for one in starts])
    start = np.concatenate(starts)
    pod = target.at(replica, start)
    return world.nodes[world.node_of[pod]], pod, start


def _registry(settings: SimulationSettings, world: World, rng: np.random.Generator) -> pd.DataFrame:
    """Port 8500: probes, and one in twelve a query."""
    node, pod, start = _probes(settings, world, "mesh/registry", 41, rng)
    n = len(start)
    size = rng.choice(np.array([421, 433, 489, 545]), n, p=np.array([0.82, 0.14, 0.03, 0.01]))
    query = rng.random(n) < 0.08
    size = np.where(query, rng.integers(3_134, 3_577, n), size)
    lasts = np.rint(PROBE.at(rng.standard_normal(n)) * 1e6).astype(np.int64)
    return table(
        n, client=node, dialled=pod, port=8500, server=pod, server_port=8500, start=start, duration=lasts,
        **sized(rng, size, 0.4),
    )  # fmt: skip


def _storage(settings: SimulationSettings, world: World, rng: np.random.Generator) -> pd.DataFrame:
    """Port 9500: probes of a fixed size and period."""
    node, pod, start = _probes(settings, world, "storage/manager", 6, rng)
    n = len(start)
    size = rng.choice(np.array([424, 492]), n, p=np.array([0.94, 0.06]))
    lasts = np.rint(PROBE.at(0.85 * rng.standard_normal(n)) * 1e6).astype(np.int64)
    return table(
        n, client=node, dialled=pod, port=9500, server=pod, server_port=9500, start=start, duration=lasts,
        **sized(rng, size, 0.4),
    )  # fmt: skip


def _agents(settings: SimulationSettings, world: World, rng: np.random.Generator) -> pd.DataFrame:
    """Port 9099: every liveness probe is refused on IPv6 and then answered on IPv4, with a few cut short."""
    node, _, start = _probes(settings, world, "nodes/agent", 18, rng)
    n = len(start)
    refusal = refused(rng, n) | {"src_bytes": np.full(n, 94), "dst_bytes": np.full(n, 78)}
    size = rng.choice(np.array([864, 863, 659, 204]), n, p=np.array([0.52, 0.44, 0.02, 0.02]))
    lasts = Quantiles(q05=0.15, q25=0.22, q50=0.3, q75=0.5, q95=3, q99=110).at(rng.standard_normal(n))
    common = {"port": 9099, "server_port": 9099}
    six = table(
        n, client=world.loopback, dialled=world.loopback, server=world.loopback, start=start, **common, **refusal
    )
    four = table(
        n, client=node, dialled=node, server=node, start=start + refusal["duration"] // 1000 + 30,
        duration=np.rint(lasts * 1e6).astype(np.int64), **common, **sized(rng, size, 0.4),
    )  # fmt: skip
    return join([six, four])
