"""Selection: which candidate ships, by one metric under one protocol, and whether any may ship at all."""

from __future__ import annotations

from typing import Final, Literal

from flowsentry.features.splits import Protocol
from flowsentry.reporting.metrics import Frozen
from flowsentry.reporting.results import Entry, Evaluation, Labels, ProtocolScores

Metric = Literal["accuracy", "balanced_accuracy", "recall", "f1"]
METRICS: Final[tuple[Metric, ...]] = ("accuracy", "balanced_accuracy", "recall", "f1")
"""accuracy: of the model's own predict, as the original study; the others at the limit. recall: under the protocol
family the mean over held-out families."""


class Ranked(Frozen):
    """A candidate's or a baseline's place in the ranking."""

    name: str
    title: str
    baseline: bool
    value: float | None
    """The metric, mean over the folds."""
    worst: float | None
    """The metric in its worst fold."""
    fpr: float | None
    """At the limit, mean over the folds."""
    excluded: str | None
    """Why it takes no part; None if it does."""


class Selection(Frozen):
    """The decision and what it rests on."""

    chosen: str | None
    reason: str
    protocol: Protocol
    metric: Metric
    labels: Labels
    ranking: tuple[Ranked, ...]
    """Candidates and identity-free baselines, best first, those excluded last."""


def choose(
    evaluation: Evaluation, *, protocol: Protocol, metric: Metric, labels: Labels, max_fpr: float = 0.005
) -> Selection:
    """Choose the best candidate, or none.

    Ranked by the metric (mean over folds), then by its worst fold, then by the lower FPR, then by simplicity: the
    order of the evaluation. A candidate must be better than every baseline that uses no identity. With the metric
    recall only those with a mean FPR of at most `max_fpr` take part, baselines too: flagging everything is no feat.

    Args:
        evaluation: of all candidates and baselines.
        protocol: whose scores decide.
        metric: one of `METRICS`.
        labels: the label set that counts.
        max_fpr: highest mean FPR with the metric recall; a fraction.
    """
    order = {entry.name: i for i, entry in enumerate(evaluation.entries)}
    taking_part = [entry for entry in evaluation.entries if not (entry.baseline and entry.uses_identity)]
    ranked = [_rank(entry, protocol, metric, labels, max_fpr) for entry in taking_part]
    ranked.sort(key=lambda r: (r.excluded is not None, _down(r.value), _down(r.worst), _up(r.fpr), order[r.name]))
    chosen, reason = _decide(evaluation, ranked, protocol, metric, max_fpr)
    return Selection(
        chosen=chosen, reason=reason, protocol=protocol, metric=metric, labels=labels, ranking=tuple(ranked)
    )


def measure(scores: ProtocolScores, *, protocol: Protocol, metric: Metric) -> tuple[float | None, float | None]:
    """The metric of `choose` in scores of that protocol: its mean over the folds and its worst fold."""
    if metric == "accuracy":
        return scores.own_mean.accuracy, scores.own_worst.accuracy
    if metric == "recall" and protocol == "family":
        return scores.family_recall.mean, scores.family_recall.worst
    return getattr(scores.mean, metric), getattr(scores.worst, metric)


def _decide(
    evaluation: Evaluation, ranked: list[Ranked], protocol: Protocol, metric: Metric, max_fpr: float
) -> tuple[str | None, str]:
    what = f"{metric.replace('_', ' ')} under the protocol {protocol}"
    if protocol not in evaluation.protocols:
        why = evaluation.impossible.get(protocol, "the flows were not split for it")
        return None, f"nothing selected: the protocol {protocol} was not possible: {why}"
    eligible = [r for r in ranked if not r.baseline and r.excluded is None]
    if not eligible:
        reasons = "; ".join(f"{r.title}: {r.excluded}" for r in ranked if not r.baseline)
        return None, f"nothing selected: no candidate takes part in {what} ({reasons or 'there are none'})"
    best = eligible[0]
    rivals = [r for r in ranked if r.baseline and r.excluded is None]
    unbeaten = [r for r in rivals if _down(r.value) <= _down(best.value)]
    if unbeaten:
        rival = unbeaten[0]
        return None, (
            f"nothing selected: the best candidate, {best.title}, has {what} {_text(best.value)}, which does not "
            f"beat the baseline {rival.title} with {_text(rival.value)}"
        )
    reason = f"{best.title} has the best {what}: {_text(best.value)}, worst fold {_text(best.worst)}"
    reason += f", FPR {_text(best.fpr)}"
    if metric == "recall":
        reason += f" (at most {max_fpr:g} allowed)"
    if rivals:
        reason += f"; the best baseline without identities, {rivals[0].title}, has {_text(rivals[0].value)}"
    return best.name, reason


def _rank(entry: Entry, protocol: Protocol, metric: Metric, labels: Labels, max_fpr: float) -> Ranked:
    by_labels = entry.scores.get(protocol)
    if by_labels is None:
        return _ranked(entry, None, None, None, "no scores under this protocol")
    scores = by_labels[labels]
    value, worst = measure(scores, protocol=protocol, metric=metric)
    fpr = scores.mean.fpr
    excluded = None
    if scores.missing:
        excluded = f"no scores for {', '.join(scores.missing)}"
    elif value is None:
        excluded = f"{metric} is undefined on these flows"
    elif metric == "recall" and (fpr is None or fpr > max_fpr):
        excluded = f"FPR {_text(fpr)} is above {max_fpr:g}"
    return _ranked(entry, value, worst, fpr, excluded)


def _ranked(entry: Entry, value: float | None, worst: float | None, fpr: float | None, excluded: str | None) -> Ranked:
    return Ranked(
        name=entry.name,
        title=entry.title,
        baseline=entry.baseline,
        value=value,
        worst=worst,
        fpr=fpr,
        excluded=excluded,
    )


def _down(value: float | None) -> float:
    return float("inf") if value is None else -value


def _up(value: float | None) -> float:
    return float("inf") if value is None else value


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
