"""The simulated cluster: nodes, workloads with their pods and service addresses, and the world outside.

Addresses are numbers everywhere inside the simulator: positions in `World.addresses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

SECOND: Final = 1_000_000
"""Times of the simulator are integers: microseconds since the recording began."""

NODES: Final = 3
CLIENTS: Final = 40
HOSTS: Final = 60
WEB_NODE_PORT: Final = 30080
SSH_NODE_PORT: Final = 31301


@dataclass(frozen=True)
class Plan:
    """How a workload is set up."""

    name: str
    """namespace/name"""
    port: int
    replicas: int
    behind_service: bool = False
    node_port: int | None = None
    rolled_out: bool = False
    """All pods are replaced, with new addresses, once in about an hour."""


PLANS: Final = (
    Plan("shop/web", 80, 3, behind_service=True, node_port=WEB_NODE_PORT, rolled_out=True),
    Plan("shop/redis", 6379, 3, behind_service=True),
    Plan("blog/joomla", 80, 2, behind_service=True, rolled_out=True),
    Plan("blog/mysql", 3306, 1, behind_service=True),
    Plan("load/generator", 0, 1, rolled_out=True),
    Plan("kube-system/coredns", 53, 2, behind_service=True),
    Plan("mesh/registry", 8500, 4),
    Plan("storage/manager", 9500, 2),
    Plan("monitoring/dashboard", 5601, 1, behind_service=True),
    Plan("monitoring/index", 9200, 2, behind_service=True),
    Plan("monitoring/scraper", 0, 2, rolled_out=True),
    Plan("ops/ssh", 22, 1, behind_service=True, node_port=SSH_NODE_PORT),
    Plan("ops/webhook", 8443, 2, behind_service=True, rolled_out=True),
    Plan("ops/jobs", 0, 2, rolled_out=True),
)


@dataclass(frozen=True)
class Workload:
    """A workload and the addresses that it has over time."""

    name: str
    port: int
    pods: Integers
    """Addresses [generations x replicas]."""
    since: Integers
    """When each generation begins, microseconds; the first is 0."""
    service: int
    """Address of the service in front of the pods; -1 without one."""
    node_port: int | None

    @property
    def replicas(self) -> int:
        return int(self.pods.shape[1])

    def at(self, replica: Integers, start: Integers) -> Integers:
        """Addresses of replicas at a time, microseconds."""
        addresses: Integers = self.pods[np.searchsorted(self.since, start, side="right") - 1, replica]
        return addresses


@dataclass(frozen=True)
class World:
    """Who there is."""

    addresses: tuple[str, ...]
    workload_names: tuple[str | None, ...]
    """namespace/name of each address; nothing outside the cluster."""
    node_of: Integers
    """Which node (0, 1, ...) each address lives on; -1 for service addresses and the world outside."""
    nodes: Integers
    clients: Integers
    """Outside clients of the cluster."""
    hosts: Integers
    """Outside hosts that the cluster talks to."""
    loopback: int
    """`::`: what the meter makes of IPv6 addresses."""
    workloads: dict[str, Workload]


def build(minutes: int, rng: np.random.Generator) -> World:
    """Build the world of a recording.

    Args:
        minutes: length of the recording; decides how often workloads are rolled out.
        rng: source of randomness.
    """
    addresses: list[str] = []
    names: list[str | None] = []
    node_of: list[int] = []

    def add(address: str, name: str | None = None, node: int = -1) -> int:
        addresses.append(address)
        names.append(name)
        node_of.append(node)
        return len(addresses) - 1

    loopback = add("::", None, 0)
    nodes = np.array([add(f"10.10.0.{11 + n}", f"nodes/node-{n + 1}", n) for n in range(NODES)])
    taken = [0] * NODES

    def pod(name: str) -> int:
        node = int(rng.integers(NODES))
        taken[node] += int(rng.integers(1, 4))
        return add(f"10.244.{node * 64 + taken[node] // 250}.{2 + taken[node] % 250}", name, node)

    since_zero = np.zeros(1, np.int64)
    workloads = {}
    for number, plan in enumerate(PLANS):
        generations = 1 + (max(1, round(minutes / 60)) if plan.rolled_out else 0)
        later = np.sort(rng.integers(0, minutes * 60 * SECOND, generations - 1))
        pods = [[pod(plan.name) for _ in range(plan.replicas)] for _ in range(generations)]
        workloads[plan.name] = Workload(
            name=plan.name,
            port=plan.port,
            pods=np.array(pods),
            since=np.concatenate([since_zero, later]),
            service=add(f"10.96.{8 + number}.{10 + number * 7}", plan.name) if plan.behind_service else -1,
            node_port=plan.node_port,
        )
    for name, port in (("nodes/kubelet", 10250), ("nodes/agent", 9099)):
        workloads[name] = Workload(name, port, nodes[None, :], since_zero, -1, None)
    api = add("10.96.0.1", "kube-system/api")
    workloads["kube-system/api"] = Workload("kube-system/api", 6443, nodes[None, :1], since_zero, api, None)
    clients = np.array([add(f"203.0.113.{n}") for n in 1 + rng.permutation(250)[:CLIENTS]])
    hosts = np.array([add(f"198.51.100.{n}") for n in 1 + rng.permutation(250)[:HOSTS]])
    return World(
        addresses=tuple(addresses),
        workload_names=tuple(names),
        node_of=np.array(node_of),
        nodes=nodes,
        clients=clients,
        hosts=hosts,
        loopback=loopback,
        workloads=workloads,
    )
