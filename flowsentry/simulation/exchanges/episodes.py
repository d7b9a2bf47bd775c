"""When attacks and hard negatives happen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowsentry.simulation.settings import WARM_UP_MINUTES, SimulationSettings
from flowsentry.simulation.world import SECOND


@dataclass(frozen=True)
class Window:
    """One run of an attack or of a hard negative; times in microseconds since the recording began."""

    number: int
    """Of the episode, over the whole recording."""
    start: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / SECOND


def episode_names(settings: SimulationSettings) -> list[str]:
    """Name of every episode, by its number: hard negatives, then attacks, each with all its runs."""
    kinds = (*settings.hard_negatives, *settings.attacks)
    return [f"{kind}-{run + 1}" for kind in kinds for run in range(settings.episodes)]


def windows(
    settings: SimulationSettings, kind: int, shortest: float, longest: float, rng: np.random.Generator
) -> list[Window]:
    """One window for every run of a kind, each somewhere in its own equal part of the time after the warm-up.

    Args:
        settings: of the recording.
        kind: position among hard negatives and attacks together.
        shortest: length, seconds.
        longest: length, seconds; cut where the parts are too short.
        rng: source of randomness.
    """
    first = WARM_UP_MINUTES * 60
    part = ((settings.minutes - 1) * 60 - first) / settings.episodes
    found = []
    for run in range(settings.episodes):
        length = min(rng.uniform(shortest, longest), 0.8 * part)
        start = first + part * run + rng.uniform(0, part - length)
        found.append(Window(kind * settings.episodes + run, round(start * SECOND), round((start + length) * SECOND)))
    return found
