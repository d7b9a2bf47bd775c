"""Splits: which flows are fitted on, which set the limit, and which are tested, for every protocol.

Splits are made by exchange, never by flow or port: twins and replies of one conversation stay on one side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import pandas as pd

Protocol = Literal["random", "time", "family", "recording"]
PARTS: Final = ("fit", "calibration", "test", "validation", "warm-up", "last-tick", "unused")
"""`fit` and `calibration` are the training rows; `validation` exists in `random` only and is touched by selection
alone; `warm-up` and `last-tick` are reported apart and never scored; `unused` takes no part in a fold."""


@dataclass(frozen=True)
class Fold:
    """One division of the flows under a protocol."""

    name: str
    """Unique; the column of `Splits.parts`: `random`, `time`, `family/<group>/<rotation>`, `recording/<name>`."""
    protocol: Protocol
    held_out: str | None
    """Family protocol: the group of families that training never saw. Recording protocol: the tested recording."""
    rotation: int
    note: str
    """For people: where the cut is, how many exchanges, ..."""


@dataclass(frozen=True)
class Splits:
    """All folds of all protocols that these flows allow."""

    parts: pd.DataFrame
    """Index: flow number. One category column per fold with values of `PARTS`."""
    folds: tuple[Fold, ...]
    impossible: dict[str, str]
    """Protocols that these flows do not allow, with the reason."""
