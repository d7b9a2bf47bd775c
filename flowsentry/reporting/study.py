"""The original study's figures, for printing beside ours."""

from __future__ import annotations

from typing import Final

from flowsentry.reporting.metrics import Frozen


class Study(Frozen):
    """Figures of an earlier study, printed beside ours."""

    source: str
    accuracy: dict[str, float]


STUDY: Final = Study(
    source="Scorpoi, public report of 2024, table 1: test accuracy on a random split",
    accuracy={"logistic_regression": 0.809, "svc": 0.978, "knn": 0.998, "decision_tree": 1.000},
)
"""By name of the model family; the ten raw columns of the `paper` view, February 2022 recording."""
