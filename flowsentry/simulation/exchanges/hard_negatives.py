"""Benign trouble that looks like an attack: its failures are labelled benign and tagged."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flowsentry.simulation.exchanges import DIRECT, SERVICE, join, mixed, refused, spread, table, unanswered
from flowsentry.simulation.exchanges.benign import choose, route
from flowsentry.simulation.exchanges.episodes import Window, windows
from flowsentry.simulation.randomness import randomness
from flowsentry.simulation.settings import HARD_NEGATIVES, HardNegative, SimulationSettings
from flowsentry.simulation.world import Integers, World


def trouble(settings: SimulationSettings, world: World, everyday: pd.DataFrame) -> pd.DataFrame:
    """Let trouble happen to everyday exchanges, and add those that it causes.

    Args:
        settings: of the recording.
        world: who there is.
        everyday: exchanges without trouble.

    Returns:
        The everyday exchanges, those with a service that is down failing, followed by the retries.
    """
    tables = [everyday]
    for kind, name in enumerate(settings.hard_negatives):
        rng = randomness(settings.seed, name)
        for window in windows(settings, kind, 60, 120, rng):
            if name == "store-restart":
                clients: tuple[str, ...] = ("shop/web", "shop/redis", "blog/joomla", "ops/jobs")
                down, nat, twins, per_second = "shop/redis", SERVICE, 0.7, 1.5
            else:
                clients, down, nat, twins, per_second = ("blog/joomla",), "blog/mysql", DIRECT, 0.0, 6.0
            tables[0] = _fail(tables[0], world, down, name, window, rng)
            n = max(10, int(rng.poisson(per_second * settings.scale * window.seconds)))
            start = spread(rng, n, window.start, window.end)
            dialled, port, server, server_port = route(world, world.workloads[down], nat, None, start, rng)
            tables.append(
                table(
                    n,
                    client=choose(clients, start, world, rng),
                    dialled=dialled,
                    port=port,
                    server=server,
                    server_port=server_port,
                    nat=nat,
                    start=start,
                    seen_twice=rng.random(n) < twins,
                    hard_negative=HARD_NEGATIVES.index(name),
                    episode=window.number,
                    **_failures(n, rng),
                )
            )
    return join(tables)


def _failures(n: int, rng: np.random.Generator) -> dict[str, Integers]:
    return mixed(rng, [refused(rng, n), unanswered(rng, n, 0.5)], [0.8, 0.2])


def _fail(
    everyday: pd.DataFrame,
    world: World,
    down: str,
    name: HardNegative,
    window: Window,
    rng: np.random.Generator,
) -> pd.DataFrame:
    hit = (
        everyday["server"].isin(world.workloads[down].pods.ravel())
        & everyday["server_port"].eq(world.workloads[down].port)
        & everyday["start"].between(window.start, window.end)
    )
    changed = everyday.copy()
    failures = _failures(int(hit.sum()), rng) | {
        "hard_negative": np.full(int(hit.sum()), HARD_NEGATIVES.index(name)),
        "episode": np.full(int(hit.sum()), window.number),
    }
    for column, values in failures.items():
        changed.loc[hit, column] = values.astype(changed[column].dtype)
    return changed
