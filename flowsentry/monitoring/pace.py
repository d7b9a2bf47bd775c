"""How fast a replay goes: one vocabulary for the pipeline and the command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from flowsentry.errors import ConfigError

STUDY_SECONDS: Final = 0.35
"""Between two flows, in the original study's replay."""
BATCH: Final = 1000
"""Flows of a request at full speed."""
_SHORTEST_SECONDS: Final = 0.01
"""Requests come no faster at a pace: more flows share one."""


@dataclass(frozen=True)
class Pace:
    """How fast flows are sent."""

    speed: float | None = 1.0
    """Times the study's pace; None: as fast as the service answers."""

    @classmethod
    def parse(cls, text: str) -> Pace:
        """`1x` (the study's own pace), `10x`, `0.5x`, or `max` (as fast as the service answers).

        Raises:
            ConfigError: it is none of these.
        """
        if text == "max":
            return cls(None)
        try:
            speed = float(text.removesuffix("x"))
        except ValueError:
            speed = math.nan
        if not (text.endswith("x") and 0 < speed < math.inf):
            raise ConfigError(f"{text} is no pace: give a factor such as 10x, or max")
        return cls(speed)

    def __str__(self) -> str:
        return "max" if self.speed is None else f"{self.speed:g}x"

    @property
    def flows(self) -> int:
        """In one request."""
        if self.speed is None:
            return BATCH
        return min(max(math.ceil(_SHORTEST_SECONDS * self.speed / STUDY_SECONDS), 1), BATCH)

    @property
    def seconds(self) -> float:
        """From one request to the next, at least."""
        return 0.0 if self.speed is None else STUDY_SECONDS / self.speed * self.flows
