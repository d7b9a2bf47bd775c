"""A world of twelve flows, small enough to score by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from flowsentry.features.splits import PARTS, Fold, Splits
from flowsentry.reporting.evaluation import Evaluation, evaluate

LIMIT = 2.0
TESTED = {
    "random": {"test": [0, 1, 2, 6, 8, 10, 11], "validation": [3, 7], "warm-up": [4], "last-tick": [5]},
    "time": {"test": [0, 1, 2, 3, 6, 7]},
    "family/flood/0": {"test": [0, 1, 6, 7]},
    "family/flood/1": {"test": [2, 3, 6, 7, 8]},
    "family/shell/0": {"test": [0, 1, 8, 9, 10]},
    "family/shell/1": {"test": [2, 3, 8, 9, 10]},
}


def make_scores(
    splits: Splits, scores: Mapping[int, float], own: set[int], changes: Mapping[tuple[str, int], float]
) -> pd.DataFrame:
    """A table of scores with the same score in every fold, but for the changes."""
    rows = []
    for fold in splits.folds:
        parts = splits.parts[fold.name]
        for flow in parts.index[~parts.isin(["fit", "calibration", "unused"])]:
            score = changes.get((fold.name, flow), scores[flow])
            rows.append((fold.name, flow, score, score >= LIMIT, flow in own))
    table = pd.DataFrame(rows, columns=["fold", "flow", "score", "flagged", "predicted"])
    return table.astype({"fold": "category", "flow": "int64", "score": "float64"})


@pytest.fixture
def flows() -> pd.DataFrame:
    """Six benign flows, two of a flood, two of a shell, a reply of the shell published as benign, one unlabelled."""
    label = ["benign"] * 6 + ["malicious"] * 4 + ["benign", None]
    corrected = ["benign"] * 6 + ["malicious"] * 5 + [None]
    attack = [None] * 6 + ["flood"] * 2 + ["shell"] * 3 + [None]
    place = ["attack window", "victim", "elsewhere", "elsewhere", "hard negative", "hard negative"] + [None] * 6
    table = pd.DataFrame(
        {"label": label, "corrected": corrected, "family": attack, "group": attack, "place": place},
        dtype="category",
    )
    table["time"] = pd.Timestamp("2022-02-25T12:00Z") + pd.to_timedelta(np.arange(12), unit="min")
    table["recording"] = pd.Categorical(["february"] * 12)
    return table.rename_axis("flow")


@pytest.fixture
def splits() -> Splits:
    folds, parts = [], {}
    for name, members in TESTED.items():
        values = np.full(12, "fit", object)
        for part, rows in members.items():
            values[rows] = part
        parts[name] = pd.Categorical(values, categories=PARTS)
        protocol, _, rest = name.partition("/")
        held_out, _, rotation = rest.partition("/")
        folds.append(Fold(name, protocol, held_out or None, int(rotation or 0), f"cut of {protocol}"))
    index = pd.RangeIndex(12, name="flow")
    return Splits(pd.DataFrame(parts, index=index), tuple(folds), {"recording": "there is one recording"})


@pytest.fixture
def model_scores(splits: Splits) -> pd.DataFrame:
    """Flags 1, 4, 6, 7, 9, 10, 11, but not 9 in family/shell/1; predicts 6, 7, 8."""
    scores = [0.5, 2.5, 0.1, 0.2, 3.0, 0.0, 4.0, 3.0, 1.0, 2.2, 2.4, 9.0]
    return make_scores(splits, dict(enumerate(scores)), {6, 7, 8}, {("family/shell/1", 9): 1.0})


@pytest.fixture
def constant_scores(splits: Splits) -> pd.DataFrame:
    return make_scores(splits, dict.fromkeys(range(12), 0.0), set(), {})


@pytest.fixture
def evaluation(
    flows: pd.DataFrame, splits: Splits, model_scores: pd.DataFrame, constant_scores: pd.DataFrame
) -> Evaluation:
    return evaluate(
        flows,
        splits,
        {"decision_tree": model_scores},
        {"constant": constant_scores, "flow_id": model_scores},
        titles={"decision_tree": "Decision tree", "constant": "Constant", "flow_id": "Flow id"},
        uses_identity={"flow_id": True},
        limit=LIMIT,
        data={"view": "paper", "flows": 12},
    )
