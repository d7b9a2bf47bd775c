"""The fitted transform of a view: from its columns to the numbers that a model sees.

Categories become their rank among the texts of the fitted rows. `paper` is then scaled to 0..1 (the study's min-max
scaling); `behaviour`, whose features are counts and ratios that are never negative, is first brought to log2(1 + x).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from flowsentry.features.views import Feature


@dataclass(frozen=True, eq=False)
class _Scaling:
    """Minima and ranges as arrays."""

    low: np.ndarray
    unit: np.ndarray


class Transform(BaseModel):
    """Fitted on training rows only; everything that it learned is in these fields, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...]
    scale: Literal["linear", "log"]
    ranks: dict[str, list[str]]
    """Sorted texts of every category feature; an unknown text gets the place where it would stand."""
    low: list[FiniteFloat]
    high: list[FiniteFloat]

    @classmethod
    def fit(cls, rows: pd.DataFrame, features: tuple[Feature, ...], scale: Literal["linear", "log"]) -> Transform:
        """Learn ranks, minima and maxima.

        Args:
            rows: training rows with the columns of `features`, at least one.
            features: the view's features.
            scale: `log` for counts and ratios, `linear` else.
        """
        ranks = {f.name: _texts(rows[f.name]) for f in features if f.kind == "category"}
        numbers = _numbers(rows, features, scale, ranks)
        low, high = numbers.min(axis=0).tolist(), numbers.max(axis=0).tolist()
        return cls(features=features, scale=scale, ranks=ranks, low=low, high=high)

    @model_validator(mode="after")
    def _complete(self) -> Transform:
        texts = {feature.name for feature in self.features if feature.kind == "category"}
        if set(self.ranks) != texts or not len(self.low) == len(self.high) == len(self.features):
            raise ValueError("ranks, minima and maxima are not those of the features")
        return self

    def apply(self, rows: pd.DataFrame) -> np.ndarray:
        """float64 [rows, features]: 0..1 on the fitted rows; a feature that was constant there keeps its unit."""
        return self._scaled(_numbers(rows, self.features, self.scale, self.ranks))

    def apply_values(self, values: np.ndarray) -> np.ndarray:
        """`apply` for a view without categories.

        Args:
            values: [rows, features] in the order of the features.
        """
        numbers = np.ascontiguousarray(values, np.float64)
        return self._scaled(np.log2(1 + numbers) if self.scale == "log" else numbers.copy())

    def _scaled(self, numbers: np.ndarray) -> np.ndarray:
        numbers -= self._scaling.low
        numbers /= self._scaling.unit
        return numbers

    @cached_property
    def _scaling(self) -> _Scaling:
        low, high = np.array(self.low), np.array(self.high)
        return _Scaling(low, np.where(high > low, high - low, 1.0))

    def minimum_effects(self) -> tuple[np.ndarray, np.ndarray]:
        """The features' minimum effects after `apply`, and log2 units (or plain ones) in one unit of its result.

        Returns:
            Two float64 [features]; the first is NaN where a feature has no minimum effect.
        """
        stated = np.array([np.nan if f.minimum_effect is None else f.minimum_effect for f in self.features])
        low, unit = self._scaling.low, self._scaling.unit
        return ((np.log2(1 + stated) if self.scale == "log" else stated) - low) / unit, unit


def _numbers(
    rows: pd.DataFrame, features: tuple[Feature, ...], scale: Literal["linear", "log"], ranks: dict[str, list[str]]
) -> np.ndarray:
    numbers = np.empty((len(rows), len(features)), np.float64)
    for i, feature in enumerate(features):
        if feature.kind == "category":
            numbers[:, i] = _rank(rows[feature.name], ranks[feature.name])
        else:
            numbers[:, i] = rows[feature.name].to_numpy(np.float64)
    if scale == "log":
        np.log2(1 + numbers, out=numbers)
    return numbers


def _texts(column: pd.Series) -> list[str]:
    return sorted({str(text) for text in column.dropna().unique()})


def _rank(column: pd.Series, texts: list[str]) -> np.ndarray:
    """Place of every text among the sorted `texts`; -1 where it is missing."""
    codes, found = pd.factorize(column.astype("string[pyarrow]"))
    places = np.searchsorted(np.array(texts, dtype=object), np.array(found, dtype=object))
    return np.append(places, -1)[codes].astype(np.float64)
