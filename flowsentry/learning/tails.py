"""Signed tails: a score learned from benign rows alone, given the direction of harm of every feature.

For each feature the *surprise* of a value is -log10 of the share of benign training rows at least as bad.
Surprises of the features are combined by their sum, their maximum, or the mean of the three largest. It is
ECOD (Li et al., "ECOD: Unsupervised Outlier Detection Using Empirical Cumulative Distribution Functions",
IEEE TKDE 2022) with the side of each tail given by the view instead of guessed from skewness, and with a tail
beyond the worst benign value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Combination = Literal["sum", "top3", "max"]
COMBINATIONS: Final = get_args(Combination)

KNOTS: Final = 4096
"""Distinct values kept per feature and side: the worst half of them exactly, the rest evenly by rank."""
MINIMUM_SCALE: Final = 1e-12
"""A tail narrower than this is taken for none: it would make any new value infinitely surprising."""


@dataclass(frozen=True)
class Tail:
    """Benign values of one feature, turned so that higher is worse."""

    feature: int
    sign: int
    values: NDArray[np.float64]
    """Distinct values, ascending."""
    counts: NDArray[np.int64]
    """Benign rows at or above each value."""
    rows: int
    scale: float
    """Width of the tail beyond the largest value, in the feature's unit."""

    @classmethod
    def fit(cls, column: NDArray[np.float64], feature: int, sign: int) -> Tail:
        values, times = np.unique(sign * column, return_counts=True)
        counts = times[::-1].cumsum()[::-1]
        median = float(np.median(sign * column))
        # A feature that never left one value says nothing about its own width: one unit, or the value's own
        # size.
        widths = (values[-1] - median, values[-1] - values[0], max(1.0, abs(values[-1])))
        scale = next(float(width) for width in widths if width > MINIMUM_SCALE)
        if len(values) > KNOTS:
            coarse = np.linspace(0, len(values) - KNOTS // 2, KNOTS // 2, endpoint=False).astype(int)
            kept = np.concatenate([coarse, np.arange(len(values) - KNOTS // 2, len(values))])
            values, counts = values[kept], counts[kept]
        return cls(feature, sign, values, counts.astype(np.int64), len(column), scale)

    def surprise(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """-log10 of the benign share at least as bad, float64[n], never negative, never decreasing with harm.

        Beyond the worst benign value a Pareto tail of index 1 goes on from 1/(n + 1): a value ten tail widths
        out is about ten times as rare. It has no end, so attacks are told apart, and grows only as a
        logarithm.
        """
        x = self.sign * X[:, self.feature]
        at = np.searchsorted(self.values, x, side="left")
        inside = at < len(self.values)
        share = (1 + np.where(inside, self.counts[np.minimum(at, len(self.values) - 1)], 0)) / (self.rows + 1)
        beyond = np.log1p(np.maximum(x - self.values[-1], 0.0) / self.scale) / np.log(10)
        surprise: NDArray[np.float64] = beyond - np.log10(share)
        return surprise


@dataclass(frozen=True)
class SignedTails:
    """The tails of all features that count."""

    tails: tuple[Tail, ...]
    features: int

    @classmethod
    def fit(cls, benign: NDArray[np.float64], harm: NDArray[np.int8]) -> SignedTails:
        """Learn the tails from benign rows.

        Features whose direction of harm is unknown (0) are left out: an unsigned tail alarms on whatever is
        merely unusual. Where a view states no direction at all, both tails of every feature count.

        Args:
            benign: float64 [n x d], n > 0.
            harm: int8 [d], each -1, 0 or 1.
        """
        signed = [(j, int(sign)) for j, sign in enumerate(harm) if sign]
        sides = signed or [(j, sign) for j in range(benign.shape[1]) for sign in (1, -1)]
        return cls(tuple(Tail.fit(benign[:, j], j, sign) for j, sign in sides), benign.shape[1])

    def score(self, X: NDArray[np.float64], combine: Combination) -> NDArray[np.float64]:
        """Combined surprise of each row, float64[n]; higher is worse, 0 is as ordinary as can be.

        Both sides of a feature without a direction count once: the worse one, less log10(2) for the choice.
        """
        per_feature: dict[int, NDArray[np.float64]] = {}
        for tail in self.tails:
            surprise = tail.surprise(X)
            if tail.feature in per_feature:
                both = np.maximum(per_feature[tail.feature], surprise) - np.log10(2)
                surprise = np.maximum(both, 0.0)
            per_feature[tail.feature] = surprise
        if combine == "max":
            return np.asarray(np.maximum.reduce(list(per_feature.values())), dtype=np.float64)
        if combine == "sum":
            # Columns are added one after another, so that a row's score does not depend on its batch.
            return np.asarray(sum(per_feature.values()), dtype=np.float64)
        worst = np.sort(np.column_stack(list(per_feature.values())), axis=1)[:, -3:]
        return np.asarray(sum(worst.T) / worst.shape[1], dtype=np.float64)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Plain arrays for `numpy.savez`."""
        return {
            "feature": np.array([t.feature for t in self.tails], dtype=np.int64),
            "sign": np.array([t.sign for t in self.tails], dtype=np.int64),
            "rows": np.array([t.rows for t in self.tails], dtype=np.int64),
            "scale": np.array([t.scale for t in self.tails], dtype=np.float64),
            "lengths": np.array([len(t.values) for t in self.tails], dtype=np.int64),
            "values": np.concatenate([t.values for t in self.tails]),
            "counts": np.concatenate([t.counts for t in self.tails]),
            "features": np.array(self.features, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> SignedTails:
        """The inverse of `to_arrays`.

        Raises:
            KeyError, ValueError: an array is missing or does not fit the others.
        """
        lengths = arrays["lengths"].astype(int)
        if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(arrays["values"]):
            raise ValueError("lengths of the tails do not add up")
        ends = np.cumsum(lengths)
        tails = []
        for i, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            tail = Tail(
                feature=int(arrays["feature"][i]),
                sign=int(arrays["sign"][i]),
                values=arrays["values"][start:end].astype(np.float64),
                counts=arrays["counts"][start:end].astype(np.int64),
                rows=int(arrays["rows"][i]),
                scale=float(arrays["scale"][i]),
            )
            ordered = (np.diff(tail.values) > 0).all() and (np.diff(tail.counts) <= 0).all()
            if not (ordered and 0 <= tail.feature < int(arrays["features"]) and tail.sign in (-1, 1)):
                raise ValueError(f"tail {i} is no tail")
            if not (len(tail.counts) == len(tail.values) and tail.scale > 0 and tail.rows > 0):
                raise ValueError(f"tail {i} is no tail")
            tails.append(tail)
        return cls(tuple(tails), int(arrays["features"]))
