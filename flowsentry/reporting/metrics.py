"""Figures of merit on plain arrays. What is undefined is None: a rate without flows, an area without a class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Frozen(BaseModel):
    """Base of the result types: immutable, no unknown fields, nothing converted in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Counts(Frozen):
    """A confusion matrix; positive means malicious."""

    tp: int
    fp: int
    tn: int
    fn: int


class Rates(Frozen):
    """Scores of one decision rule (flagged at the limit) and of the score behind it (the two areas)."""

    accuracy: float | None
    balanced_accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    fpr: float | None
    roc_auc: float | None
    average_precision: float | None


class OwnRates(Frozen):
    """Scores of the model's own predict, as the original study used it."""

    accuracy: float | None
    recall: float | None
    fpr: float | None


class Share(Frozen):
    """How many of some flows were flagged."""

    flows: int
    flagged: int
    rate: float | None


def share(flows: int, flagged: int) -> Share:
    """`flagged / flows`; the rate is None without flows."""
    return Share(flows=flows, flagged=flagged, rate=_ratio(flagged, flows))


def count(truth: Bools, flagged: Bools) -> Counts:
    """The confusion matrix of `flagged` against `truth` (True: malicious), both of shape [n]."""
    positives, hits, alarms = int(truth.sum()), int((truth & flagged).sum()), int(flagged.sum())
    false_alarms = alarms - hits
    return Counts(tp=hits, fp=false_alarms, tn=truth.size - positives - false_alarms, fn=positives - hits)


def rates(counts: Counts, truth: Bools, score: Floats) -> Rates:
    """All scores at the limit from its confusion matrix, and the areas under the curves of `score` ([n])."""
    recall, fpr = _ratio(counts.tp, counts.tp + counts.fn), _ratio(counts.fp, counts.fp + counts.tn)
    balanced = None if recall is None or fpr is None else (recall + 1 - fpr) / 2
    roc_auc, average_precision = areas(truth, score)
    return Rates(
        accuracy=_ratio(counts.tp + counts.tn, truth.size),
        balanced_accuracy=balanced,
        precision=_ratio(counts.tp, counts.tp + counts.fp),
        recall=recall,
        f1=None if recall is None else _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn),
        fpr=fpr,
        roc_auc=roc_auc,
        average_precision=average_precision,
    )


def own_rates(counts: Counts) -> OwnRates:
    """The three scores of a model's own predict."""
    return OwnRates(
        accuracy=_ratio(counts.tp + counts.tn, counts.tp + counts.fp + counts.tn + counts.fn),
        recall=_ratio(counts.tp, counts.tp + counts.fn),
        fpr=_ratio(counts.fp, counts.fp + counts.tn),
    )


def cumulative(truth: Bools, score: Floats) -> tuple[Floats, Ints, Ints]:
    """Falling distinct thresholds, true and false positives at or above each; all of shape [k]."""
    order = np.argsort(-score, kind="stable")
    ordered, hits = score[order], np.cumsum(truth[order], dtype=np.int64)
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if ordered.size else np.array([], np.int64)
    return ordered[last], hits[last], last + 1 - hits[last]


def areas(truth: Bools, score: Floats) -> tuple[float | None, float | None]:
    """Area under the ROC curve (ties count half) and average precision; the same values as scikit-learn's.

    The first is None unless both classes are there, the second without malicious flows.
    """
    positives = int(truth.sum())
    if not positives:
        return None, None
    _, tp, fp = cumulative(truth, score)
    gained = np.diff(tp, prepend=0)
    average_precision = float((gained * (tp / (tp + fp))).sum() / positives)
    negatives = truth.size - positives
    if not negatives:
        return None, average_precision
    middle = fp - np.diff(fp, prepend=0) / 2
    return float((gained * (negatives - middle)).sum() / (positives * negatives)), average_precision


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
