"""What an evaluation found: a tree of immutable, strictly typed results. What is undefined is None."""

from __future__ import annotations

from typing import Final, Literal

import pandas as pd
from pydantic import JsonValue

from flowsentry.features.splits import Protocol
from flowsentry.reporting import tables
from flowsentry.reporting.metrics import Counts, Frozen, OwnRates, Rates, Share

Labels = Literal["published", "corrected"]
LABELS: Final[tuple[Labels, ...]] = ("published", "corrected")
PROTOCOLS: Final[tuple[Protocol, ...]] = ("random", "time", "family", "recording")


class FoldScores(Frozen):
    """One candidate's scores in one fold on one label set."""

    fold: str
    held_out: str | None
    rotation: int
    counts: Counts
    at_limit: Rates
    own_counts: Counts
    own: OwnRates
    families: dict[str, Share]
    """Malicious flows flagged, by family; under the family protocol only of the group that was held out."""
    places: dict[str, Share]
    """Benign flows flagged, by place."""
    apart: dict[str, Share]
    """Benign flows flagged in the warm-up and in the last tick; not part of any other figure."""


class Spread(Frozen):
    """A rate over the folds of a protocol."""

    flows: int
    """Distinct flows behind it."""
    mean: float | None
    worst: float | None
    worst_fold: str | None


class ProtocolScores(Frozen):
    """One candidate's scores over all folds of a protocol on one label set."""

    folds: tuple[FoldScores, ...]
    missing: tuple[str, ...]
    """Folds that the candidate has no scores for."""
    benign: int
    malicious: int
    """Distinct flows tested in any fold; under the family protocol malicious ones of held-out groups alone."""
    counts: Counts
    """Summed over the folds."""
    own_counts: Counts
    mean: Rates
    worst: Rates
    """Each rate in its own worst fold: the highest FPR, the lowest of everything else."""
    own_mean: OwnRates
    own_worst: OwnRates
    families: dict[str, Spread]
    family_recall: Spread
    """Mean over families of their mean recall; worst: the family and fold with the lowest recall."""
    places: dict[str, Spread]
    apart: dict[str, Spread]


class Entry(Frozen):
    """A candidate or a baseline."""

    name: str
    title: str
    baseline: bool
    uses_identity: bool
    """Values such as addresses, ports, flow ids or timestamps decide: it knows no attack from elsewhere."""
    scores: dict[Protocol, dict[Labels, ProtocolScores]]


class FoldNote(Frozen):
    """What a fold is, for people, with its tested flows on the corrected labels."""

    fold: str
    protocol: Protocol
    note: str
    benign: int
    malicious: int


class Evaluation(Frozen):
    """Everything that one run measured; `model_validate_json` reads what `to_json` wrote."""

    limit: float
    data: dict[str, JsonValue]
    """What was evaluated: view, files and digests, rows; for people and for the model card."""
    entries: tuple[Entry, ...]
    """Candidates from simple to complex, then baselines."""
    folds: tuple[FoldNote, ...]
    impossible: dict[str, str]
    corrections: int
    """Flows whose corrected label differs from the published one."""

    @property
    def candidates(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.baseline)

    @property
    def baselines(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.baseline)

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The protocols that these flows allowed."""
        return tuple(p for p in PROTOCOLS if any(fold.protocol == p for fold in self.folds))

    @property
    def label_sets(self) -> tuple[Labels, ...]:
        """Label sets that differ: the corrected ones alone when nothing was corrected."""
        return LABELS if self.corrections else ("corrected",)

    @property
    def is_study(self) -> bool:
        """True if the figures can be laid beside the original study's."""
        return self.data.get("view") == "paper"

    def entry(self, name: str) -> Entry:
        """The candidate or baseline of that name.

        Raises:
            KeyError: there is none.

        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def to_json(self) -> str:
        """JSON; what is undefined is null."""
        return self.model_dump_json(indent=1)

    def table(self, protocol: Protocol, labels: Labels) -> pd.DataFrame:
        """All figures of a protocol: a row per candidate and baseline (index: name), NaN where undefined.

        Columns: title, baseline, uses_identity, tp, fp, tn, fn (summed over folds); every rate of `Rates` as its
        mean and, with the suffix `_worst`, in its worst fold; the same of `OwnRates` with the prefix `own_`;
        family_recall and family_recall_worst.
        """
        rows: dict[str, dict[str, object]] = {}
        for entry in self.entries:
            if protocol not in entry.scores:
                continue
            scores = entry.scores[protocol][labels]
            row: dict[str, object] = {
                "title": entry.title,
                "baseline": entry.baseline,
                "uses_identity": entry.uses_identity,
                **scores.counts.model_dump(),
            }
            for suffix, own, at_limit in (
                ("", scores.own_mean, scores.mean),
                ("_worst", scores.own_worst, scores.worst),
            ):
                row |= {f"own_{name}{suffix}": _number(value) for name, value in own.model_dump().items()}
                row |= {f"{name}{suffix}": _number(value) for name, value in at_limit.model_dump().items()}
            row["family_recall"] = _number(scores.family_recall.mean)
            row["family_recall_worst"] = _number(scores.family_recall.worst)
            rows[entry.name] = row
        return pd.DataFrame.from_dict(rows, orient="index")

    def headline(self, entry: Entry, protocol: Protocol, labels: Labels) -> dict[str, float | None]:
        """The four figures of the side by side table: own (predict) accuracy, accuracy, recall, fpr.

        Under the family protocol recall is the mean over held-out families.
        """
        scores = entry.scores[protocol][labels]
        recall = scores.family_recall.mean if protocol == "family" else scores.mean.recall
        return {
            "own": scores.own_mean.accuracy,
            "accuracy": scores.mean.accuracy,
            "recall": recall,
            "fpr": scores.mean.fpr,
        }

    @property
    def family_protocol(self) -> Protocol | None:
        """The protocol of recall per family and FPR by place: families held out, where possible."""
        return next((p for p in ("family", "time", "random", "recording") if p in self.protocols), None)

    def to_markdown(self) -> str:
        """The report's tables in Markdown."""
        return tables.markdown(self)

    def summary_text(self) -> str:
        """The tables for a terminal, at most 110 columns wide."""
        return tables.terminal(self)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
