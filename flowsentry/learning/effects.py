"""Effect sizes: how far a row is beyond the minimum effects that its view states. Nothing is learned from rows;
the minimum effects themselves were set by hand (docs/decisions/0009).

The score is the greatest excess over the features, on the view's own logarithmic scale: a burst of four times its
minimum effect is as bad as a fan-out of four times its own. Where a row stands among benign ones does not enter, so
one benign incident that training did not see moves the limit by its size and not by its rarity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EffectSizes:
    """The minimum effects of a view, in the units of X."""

    minimum: NDArray[np.float64]
    """float64 [d]: the value of X at the minimum effect; NaN where the view states none."""
    unit: NDArray[np.float64]
    """float64 [d]: units of the view's scale (log2 of the feature plus one) in one unit of X."""

    def score(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Greatest excess over a minimum effect, float64 [n], in log2 units; 0 is just at it, below it negative."""
        stated = np.flatnonzero(~np.isnan(self.minimum))
        excess = (X[:, stated] - self.minimum[stated]) * self.unit[stated]
        return np.asarray(excess.max(axis=1), dtype=np.float64)

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Plain arrays for `numpy.savez`."""
        return {"minimum": self.minimum, "unit": self.unit}
