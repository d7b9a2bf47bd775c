"""The HTML pages of an evaluation and of a feature view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np
import pandas as pd

from flowsentry.features.splits import Protocol, Splits
from flowsentry.features.views import Feature, FeatureSet
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.reporting import charts, tables
from flowsentry.reporting.evaluation import Pooled, pool
from flowsentry.reporting.metrics import Floats
from flowsentry.reporting.pages import number, render
from flowsentry.reporting.results import Entry, Evaluation, Labels, Spread
from flowsentry.reporting.study import STUDY

PROTOCOL_TITLES: Final[Mapping[Protocol, str]] = {
    "random": "random split",
    "time": "later flows",
    "family": "families never trained on",
    "recording": "another recording",
}
_BINS: Final = 48
_TOP: Final = 5


def evaluation_html(
    evaluation: Evaluation,
    flows: pd.DataFrame,
    splits: Splits,
    scores: Mapping[str, pd.DataFrame],
    *,
    best: str | None = None,
) -> str:
    """One self-contained page: tables, confusion matrices, curves, families, places and a time line.

    Args:
        evaluation: what `evaluate` found.
        flows: the flow table it was made from, with `time` and `recording`.
        splits: of the same flows.
        scores: the candidates' tables of scores by name.
        best: the candidate of the time line; None: the one with the highest balanced accuracy under the hardest
            protocol.
    """
    protocol = evaluation.family_protocol
    best = best or _best(evaluation)
    labels: Labels = "corrected"
    panels = []
    for name in evaluation.protocols:
        rows = {
            entry.title: pool(flows, splits, scores[entry.name], protocol=name, labels=labels)
            for entry in evaluation.candidates
            if entry.name in scores
        }
        panels.append((PROTOCOL_TITLES[name], rows))
    time_line = None
    if best is not None and protocol is not None and best in scores:
        rows_of_best = pool(flows, splits, scores[best], protocol=protocol, labels=labels)
        time_line = _time_line(evaluation, flows, rows_of_best)
    return render(
        "evaluation.html.j2",
        evaluation=evaluation,
        protocol=protocol,
        protocol_titles=PROTOCOL_TITLES,
        best=None if best is None else evaluation.entry(best),
        tiles=_tiles(evaluation),
        side_by_side=[tables.side_by_side(evaluation, name) for name in evaluation.label_sets],
        families=[_bars(evaluation, name, "families") for name in evaluation.label_sets],
        places=[_bars(evaluation, name, "places") for name in evaluation.label_sets],
        fooled=_fooled(evaluation),
        fooled_labels=_fooled_labels(evaluation),
        curves=charts.curves(panels) if panels else None,
        time_line=time_line,
        notes=tables.notes(evaluation),
        study=STUDY if evaluation.is_study else None,
    )


class BarRow(NamedTuple):
    """A row of bars: one per candidate, None where the candidate has no such rate."""

    name: str
    flows: int
    scored: bool
    cells: tuple[Spread | None, ...]


class BarTable(NamedTuple):
    """Rates with bars, a column per candidate."""

    labels: Labels
    header: tuple[str, ...]
    rows: tuple[BarRow, ...]
    scale: float
    """The rate that fills a bar."""


def _bars(evaluation: Evaluation, labels: Labels, kind: Literal["families", "places"]) -> BarTable:
    protocol = evaluation.family_protocol
    candidates = evaluation.candidates if protocol is not None else ()
    found = [entry.scores[protocol][labels] for entry in candidates] if protocol is not None else []
    rows = []
    for part in ("families",) if kind == "families" else ("places", "apart"):
        spreads: list[Mapping[str, Spread]] = [getattr(scores, part) for scores in found]
        for name in dict.fromkeys(name for by_name in spreads for name in by_name):
            cells = tuple(by_name.get(name) for by_name in spreads)
            flows = max(cell.flows for cell in cells if cell is not None)
            rows.append(BarRow(name, flows, part != "apart", cells))
    if kind == "families":
        rows.sort(key=lambda row: -row.flows)
        return BarTable(labels, tuple(entry.title for entry in candidates), tuple(rows), 1.0)
    worst = [cell.worst or 0.0 for row in rows for cell in row.cells if cell is not None]
    return BarTable(labels, tuple(entry.title for entry in candidates), tuple(rows), max([*worst, 0.001], default=1.0))


class Fooled(NamedTuple):
    """How a model's own predict fares when the test is less like the training."""

    entry: Entry
    random: float | None
    time: float | None
    family: float | None
    family_worst: float | None


def _fooled_labels(evaluation: Evaluation) -> Labels:
    return "published" if evaluation.is_study else "corrected"


def _fooled(evaluation: Evaluation) -> list[Fooled]:
    labels = _fooled_labels(evaluation)
    rows = []
    for entry in evaluation.entries:
        own = {protocol: scores[labels] for protocol, scores in entry.scores.items()}
        rows.append(
            Fooled(
                entry,
                own["random"].own_mean.accuracy if "random" in own else None,
                own["time"].own_mean.accuracy if "time" in own else None,
                own["family"].own_mean.recall if "family" in own else None,
                own["family"].own_worst.recall if "family" in own else None,
            )
        )
    return rows


class Tile(NamedTuple):
    """One figure in large type."""

    label: str
    value: str
    note: str


def _tiles(evaluation: Evaluation) -> list[Tile]:
    protocol, tiles = evaluation.family_protocol, []
    best = _best(evaluation)
    if best is not None and protocol is not None:
        entry = evaluation.entry(best)
        scores = entry.scores[protocol]["corrected"]
        recall = scores.family_recall if protocol == "family" else None
        mean, worst = (recall.mean, recall.worst) if recall else (scores.mean.recall, scores.worst.recall)
        where = PROTOCOL_TITLES[protocol]
        note = f"{entry.title}; worst {tables.percent(worst)} %"
        tiles.append(Tile(f"Recall, {where}", f"{tables.percent(mean)} %", note))
        note = f"{entry.title}; worst fold {tables.percent(scores.worst.fpr)} %"
        tiles.append(Tile("False positive rate at the limit", f"{tables.percent(scores.mean.fpr)} %", note))
    if "random" in evaluation.protocols:
        for label, entries in (
            ("Best accuracy, random split", evaluation.candidates),
            ("Best identity alone, random split", [e for e in evaluation.baselines if e.uses_identity]),
        ):
            ranked = [
                (accuracy, entry.title)
                for entry in entries
                if (accuracy := entry.scores["random"]["corrected"].own_mean.accuracy) is not None
            ]
            if ranked:
                top = max(ranked, key=lambda pair: pair[0])
                tiles.append(Tile(label, f"{tables.percent(top[0])} %", f"{top[1]}, own predict"))
    return tiles


def _best(evaluation: Evaluation) -> str | None:
    protocol = evaluation.family_protocol
    if protocol is None or not evaluation.candidates:
        return None

    def quality(entry: Entry) -> float:
        value = entry.scores[protocol]["corrected"].mean.balanced_accuracy
        return -1.0 if value is None else value

    return max(evaluation.candidates, key=quality).name


def _time_line(evaluation: Evaluation, flows: pd.DataFrame, rows: Pooled) -> object:
    if not rows.position.size:
        return None
    recording = flows["recording"].cat.codes.to_numpy()[rows.position]
    largest = np.bincount(recording[recording >= 0]).argmax() if (recording >= 0).any() else -1
    keep = recording == largest
    times = pd.DatetimeIndex(flows["time"]).take(rows.position[keep])
    chosen = Pooled(rows.position[keep], rows.malicious[keep], rows.score[keep], rows.flagged[keep])
    return charts.time_line(times, chosen, evaluation.limit)


def view_html(feature_set: FeatureSet, labels: pd.Series) -> str:
    """The page of a feature view: every feature with its meaning, statistics and distribution by label.

    Args:
        feature_set: the view's values.
        labels: benign or malicious by flow number (index); missing where unknown.
    """
    manifest, rows = feature_set.manifest, feature_set.rows
    label = labels.reindex(rows["flow"])
    classes = {
        name: label.eq(name).fillna(False).to_numpy(bool) for name in (BENIGN, MALICIOUS) if (label == name).any()
    }
    if not classes:
        classes = {"all": np.ones(len(rows), bool)}
    features = [
        {
            "feature": feature,
            "harm": {1: "higher is worse", -1: "lower is worse", 0: "–"}[feature.harm],
            "statistics": manifest.statistics.get(feature.name, {}),
            "histogram": _histogram(feature, rows[feature.name], classes),
            "values": _values(rows[feature.name], classes) if feature.kind == "category" else [],
        }
        for feature in manifest.features
    ]
    return render(
        "view.html.j2",
        manifest=manifest,
        features=features,
        rows=len(rows),
        classes={name: int(chosen.sum()) for name, chosen in classes.items()},
    )


class Histogram(NamedTuple):
    """Shares of a class per bin as SVG paths in a box of `WIDTH` by `HEIGHT`, one per class."""

    paths: dict[str, str]
    low: str
    high: str
    logarithmic: bool


WIDTH: Final = 240
HEIGHT: Final = 44


def _histogram(feature: Feature, column: pd.Series, classes: Mapping[str, np.ndarray]) -> Histogram | None:
    if feature.kind == "category":
        return None
    values = pd.to_numeric(column).to_numpy(np.float64, na_value=np.nan)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    low, high = float(values[finite].min()), float(values[finite].max())
    medians = [float(np.median(values[own])) for chosen in classes.values() if (own := chosen & finite).any()]
    logarithmic = low >= 0 and high > 100 * max(min(medians, default=high), 0.1)
    scaled: Floats = np.log1p(values) if logarithmic else values
    first, last = (float(np.log1p(low)), float(np.log1p(high))) if logarithmic else (low, high)
    if first == last:
        first, last = first - 0.5, last + 0.5
    edges = np.linspace(first, last, _BINS + 1)
    shares = {}
    for name, chosen in classes.items():
        counts, _ = np.histogram(scaled[chosen & finite], edges)
        shares[name] = np.sqrt(counts / max(counts.sum(), 1))
    top = max(float(share.max()) for share in shares.values()) or 1.0
    paths = {name: _steps(share / top) for name, share in shares.items()}
    return Histogram(paths, number(low), number(high), logarithmic)


def _steps(height: Floats) -> str:
    """An SVG path over the box: a step per bin, heights from 0 to 1."""
    width, points = WIDTH / height.size, [f"M0 {HEIGHT}"]
    for i, value in enumerate(height):
        points.append(f"V{HEIGHT * (1 - value):.1f}H{(i + 1) * width:.1f}")
    return "".join([*points, f"V{HEIGHT}Z"])


def _values(column: pd.Series, classes: Mapping[str, np.ndarray]) -> list[dict[str, object]]:
    """The most frequent values of a category and their share in every class."""
    top = column.value_counts().head(_TOP).index
    return [
        {
            "value": str(value),
            "shares": {name: float((column[chosen] == value).mean()) for name, chosen in classes.items()},
        }
        for value in top
    ]
