"""Benign trouble that looks like an attack: its failures are labelled benign and tagged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.simulation.exchanges import DIRECT, SERVICE, join, mixed, refused, spread, table, unanswered
from flowsentry.simulation.exchanges.benign import choose, route
from flowsentry.simulation.exchanges.episodes import Window, windows
from flowsentry.simulation.randomness import randomness
from flowsentry.simulation.settings import HARD_NEGATIVES, HardNegative, SimulationSettings
from flowsentry.simulation.world import Integers, Workload, World


@dataclass(frozen=True)
class Outage:
    """A workload does not answer for a minute or two, and its clients try again and again."""

    down: str
    clients: tuple[str, ...]
    per_second: float
    """Attempts at scale 1, over all clients, beside the everyday exchanges that fail."""
    nat: int
    twins: float
    """Share of attempts that are seen on both sides of the translation."""


OUTAGES: Final[Mapping[HardNegative, Outage]] = {
    "store-restart": Outage("shop/redis", ("shop/web", "shop/redis", "blog/joomla", "ops/jobs"), 1.2, SERVICE, 0.7),
    "database-outage": Outage("blog/mysql", ("blog/joomla",), 4.5, DIRECT, 0.0),
}


def trouble(settings: SimulationSettings, world: World, everyday: pd.DataFrame) -> pd.DataFrame:
    """Let trouble happen to everyday exchanges, and add those that it causes.

    Args:
        settings: of the recording.
        world: who there is.
        everyday: exchanges without trouble.

    Returns:
        The everyday exchanges, those with a service that is down failing, followed by the retries.
    """
    everyday = everyday.copy()
    tables = [everyday]
    for kind, name in enumerate(settings.hard_negatives):
        rng = randomness(settings.seed, name)
        outage = OUTAGES[name]
        down = world.workloads[outage.down]
        for window in windows(settings, kind, 60, 120, rng):
            tag = {"hard_negative": HARD_NEGATIVES.index(name), "episode": window.number}
            _fail(everyday, down, window, tag, rng)
            n = max(10, int(rng.poisson(outage.per_second * settings.scale * window.seconds)))
            start = spread(rng, n, window.start, window.end)
            dialled, port, server, server_port = route(world, down, outage.nat, None, start, rng)
            tables.append(
                table(
                    n,
                    client=choose(outage.clients, start, world, rng),
                    dialled=dialled,
                    port=port,
                    server=server,
                    server_port=server_port,
                    nat=outage.nat,
                    start=start,
                    seen_twice=rng.random(n) < outage.twins,
                    **tag,
                    **_failures(n, rng),
                )
            )
    return join(tables)


def _failures(n: int, rng: np.random.Generator) -> dict[str, Integers]:
    return mixed(rng, [refused(rng, n), unanswered(rng, n, 0.5)], [0.8, 0.2])


def _fail(
    everyday: pd.DataFrame, down: Workload, window: Window, tag: dict[str, int], rng: np.random.Generator
) -> None:
    """Let the everyday exchanges with a workload that is down fail, in place."""
    hit = (
        everyday["server"].isin(down.pods.ravel())
        & everyday["server_port"].eq(down.port)
        & everyday["start"].between(window.start, window.end)
    ).to_numpy()
    for column, values in (_failures(int(hit.sum()), rng) | tag).items():
        changed = everyday[column].to_numpy().copy()
        changed[hit] = values
        everyday[column] = changed
