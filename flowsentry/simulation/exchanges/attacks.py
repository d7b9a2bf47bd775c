"""Attacks, by sources that also behave, on services in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.simulation.exchanges import (
    DIRECT,
    EGRESS,
    NODE_PORT,
    SERVICE,
    UDP,
    Quantiles,
    answered,
    join,
    mixed,
    refused,
    reset,
    sized,
    spread,
    table,
    unanswered,
)
from flowsentry.simulation.exchanges.benign import choose, route
from flowsentry.simulation.exchanges.episodes import Window, windows
from flowsentry.simulation.randomness import randomness
from flowsentry.simulation.settings import GROUPS, Attack, SimulationSettings
from flowsentry.simulation.world import SECOND, Integers, World

FREQUENT_CLIENTS: Final = 12
"""Outside attackers are among the clients that call most."""
FOOTHOLDS: Final = ("shop/web", "blog/joomla", "ops/jobs")
"""Workloads whose pods are taken over."""
FLOODED_FROM_OUTSIDE: Final = (("shop/web", NODE_PORT), ("ops/ssh", NODE_PORT))
FLOODED_FROM_INSIDE: Final = (
    ("shop/web", SERVICE),
    ("blog/joomla", SERVICE),
    ("shop/redis", SERVICE),
    ("blog/mysql", DIRECT),
    ("mesh/registry", DIRECT),
    ("monitoring/dashboard", DIRECT),
    ("ops/webhook", SERVICE),
)
"""Workloads, and the way to them."""
BEACON_PORTS: Final = (443, 80, 8443)

SESSION: Final = Quantiles(q05=1_266, q50=2_400, q95=4_200)
SESSION_TIME: Final = Quantiles(q05=200, q50=1_900, q95=10_095)
TUNNEL: Final = Quantiles(q05=420, q50=760, q95=1_300)
TUNNEL_TIME: Final = Quantiles(q05=8, q50=35, q95=180)


def assaults(settings: SimulationSettings, world: World) -> pd.DataFrame:
    """All exchanges of all attacks, by attack and run."""
    tables = []
    families = list(GROUPS)
    for position, name in enumerate(settings.attacks):
        shortest, longest, attack = ATTACKS[name]
        rng = randomness(settings.seed, name)
        for window in windows(settings, len(settings.hard_negatives) + position, shortest, longest, rng):
            run = attack(settings, world, window, rng)
            tables.append(run.assign(family=families.index(name), episode=window.number))
    # `assign` makes them int64
    return join(tables).astype({"family": "int16"})


def _volume(settings: SimulationSettings, typical: float, least: int, rng: np.random.Generator) -> int:
    """Number of exchanges of a run: `typical` at scale 1, stronger or weaker by chance."""
    return max(least, round(typical * settings.scale * float(rng.lognormal(0, 0.3))))


def _outsider(world: World, rng: np.random.Generator) -> int:
    return int(world.clients[rng.integers(FREQUENT_CLIENTS)])


def _foothold(world: World, start: Integers, rng: np.random.Generator) -> int:
    """A pod that lives when the attack begins."""
    return int(choose(FOOTHOLDS, start[:1], world, rng)[0])


def _syn_flood(settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator) -> pd.DataFrame:
    """SYNs to any service in use, in waves: from outside to a node port, or from a pod."""
    n = _volume(settings, 1_000, 60, rng)
    wave = 10 * SECOND
    strength = rng.gamma(1.0, 1.0, max(1, (window.end - window.start) // wave))
    which = rng.choice(len(strength), n, p=strength / strength.sum())
    start = np.sort(window.start + which * wave + rng.integers(0, wave, n))
    outside = rng.random() < 0.5
    targets = FLOODED_FROM_OUTSIDE if outside else FLOODED_FROM_INSIDE
    target, nat = targets[rng.integers(len(targets))]
    dialled, port, server, server_port = route(world, world.workloads[target], nat, None, start, rng)
    return table(
        n,
        client=_outsider(world, rng) if outside else _foothold(world, start, rng),
        dialled=dialled[0],
        port=port,
        server=dialled[0] if nat == DIRECT else server,
        server_port=server_port,
        nat=nat,
        start=start,
        **unanswered(rng, n, 0.07),
    )


def _ssh_brute_force(
    settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator
) -> pd.DataFrame:
    """Guesses at the SSH server: most get no further than the handshake, some are short sessions."""
    n = _volume(settings, 500, 40, rng)
    start = spread(rng, n, window.start, window.end)
    outside = rng.random() < 0.7
    nat = NODE_PORT if outside else SERVICE
    dialled, port, server, server_port = route(world, world.workloads["ops/ssh"], nat, None, start, rng)
    cut_short = sized(rng, rng.choice(np.array([220, 286, 356, 400]), n), 0.5)
    kinds = [
        unanswered(rng, n, 0.5),
        refused(rng, n),
        reset(rng, n),
        cut_short | {"duration": rng.integers(180_000, 200_000_000, n)},
        answered(rng, n, SESSION, SESSION_TIME, src_share=0.45),
    ]
    return table(
        n,
        client=_outsider(world, rng) if outside else _foothold(world, start, rng),
        dialled=dialled[0],
        port=port,
        server=server,
        server_port=server_port,
        nat=nat,
        start=start,
        seen_twice=rng.random(n) < 0.95,
        replied=rng.random(n) < 0.07,
        **mixed(rng, kinds, [0.25, 0.15, 0.15, 0.2, 0.25]),
    )


def _refused_beacon(
    settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator
) -> pd.DataFrame:
    """A shell calls back about every 30 s to a host that refuses."""
    n = max(3, round(window.seconds / 30))
    gaps = np.rint(30 * SECOND * rng.uniform(0.7, 1.3, n)).astype(np.int64)
    start = window.start + np.cumsum(gaps) - gaps[0]
    host = world.hosts[rng.integers(len(world.hosts))]
    port = rng.choice(np.array(BEACON_PORTS))
    return table(
        n,
        client=_foothold(world, start, rng),
        dialled=host,
        port=port,
        server=host,
        server_port=port,
        nat=EGRESS,
        start=start,
        seen_twice=rng.random(n) < 0.98,
        **refused(rng, n),
    )


def _port_scan(settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator) -> pd.DataFrame:
    """Many ports of one pod or node, those in use among them; some scanners keep one source port."""
    used = np.array([80, 22, 3306, 6379, 8500, 9500, 5601, 9200, 9300, 8443, 10250, 6443, 9099, 443])
    n = _volume(settings, 640, 60, rng)
    ports = rng.permutation(65_535)[: n - len(used)] + 1
    ports = rng.permutation(np.concatenate([used, ports[~np.isin(ports, used)]]))
    n = len(ports)
    start = spread(rng, n, window.start, window.end)
    victim = world.workloads[("blog/mysql", "shop/redis", "nodes/kubelet")[rng.integers(3)]]
    target = victim.at(np.zeros(1, np.int64), start[:1])[0]
    failures = mixed(rng, [refused(rng, n), unanswered(rng, n, 0.3)], [0.85, 0.15])
    is_open = (ports == victim.port).astype(np.int64)
    opened = reset(rng, n)
    return table(
        n,
        client=_foothold(world, start, rng),
        dialled=target,
        port=ports,
        server=target,
        server_port=ports,
        nat=DIRECT,
        start=start,
        client_port=rng.integers(33_000, 60_000) if rng.random() < 0.3 else -1,
        **{name: np.where(is_open, opened[name], failures[name]) for name in opened},
    )


def _bulk_exfiltration(
    settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator
) -> pd.DataFrame:
    """Transfers of some tens of megabytes to one outside host, over HTTPS."""
    n = max(8, round(24 * float(rng.lognormal(0, 0.3))))
    start = spread(rng, n, window.start, window.end)
    host = world.hosts[rng.integers(len(world.hosts))]
    total = np.rint(15e6 * rng.lognormal(0, 0.6, n)).astype(np.int64)
    per_second = 1e6 * rng.uniform(2, 10, n)
    return table(
        n,
        client=_foothold(world, start, rng),
        dialled=host,
        port=443,
        server=host,
        server_port=443,
        nat=EGRESS,
        start=start,
        duration=np.rint(total / per_second * 1e9).astype(np.int64),
        seen_twice=rng.random(n) < 0.95,
        **sized(rng, total, 0.97),
    )


def _dns_tunnel(settings: SimulationSettings, world: World, window: Window, rng: np.random.Generator) -> pd.DataFrame:
    """Queries that carry data out, answers that carry data in, through the cluster's own name service."""
    n = _volume(settings, 700, 60, rng)
    start = spread(rng, n, window.start, window.end)
    dialled, port, server, server_port = route(world, world.workloads["kube-system/coredns"], SERVICE, None, start, rng)
    return table(
        n,
        client=_foothold(world, start, rng),
        dialled=dialled,
        port=port,
        server=server,
        server_port=server_port,
        transport=UDP,
        nat=SERVICE,
        start=start,
        seen_twice=rng.random(n) < 0.95,
        **answered(rng, n, TUNNEL, TUNNEL_TIME, src_share=0.55, transport=UDP),
    )


Run = Callable[[SimulationSettings, World, Window, np.random.Generator], pd.DataFrame]

ATTACKS: Final[Mapping[Attack, tuple[float, float, Run]]] = {
    "syn-flood": (60, 150, _syn_flood),
    "ssh-brute-force": (150, 400, _ssh_brute_force),
    "refused-beacon": (480, 900, _refused_beacon),
    "port-scan": (40, 120, _port_scan),
    "bulk-exfiltration": (180, 420, _bulk_exfiltration),
    "dns-tunnel": (60, 140, _dns_tunnel),
}
"""Shortest and longest run, seconds, and what happens in it."""
