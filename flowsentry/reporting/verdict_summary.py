"""What a batch of verdicts says: alerts by anomaly type, place and time, and scores where labels are known.

A flow counts once, with the verdict of its last report; an *alert* is a flow called malicious, told with the report
that raised it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
import pandas as pd

from flowsentry.detector import Detector
from flowsentry.flows.labels import GENERIC_FAMILY
from flowsentry.flows.schema import MALICIOUS, is_malicious
from flowsentry.reporting import charts
from flowsentry.reporting.metrics import Bools, Counts, Floats, Frozen, Ints, Rates, Share, count, rates, share
from flowsentry.reporting.pages import render
from flowsentry.reporting.results import LABELS, Labels
from flowsentry.reporting.tables import percent, plain

TOP: Final = 10
"""Sources, destinations, ... that are told."""
FIRST_ALERTS: Final = 100
CHARTED_RECORDINGS: Final = 3
SHORT_HOURS: Final = 6
"""Recordings up to this long are told by ten minutes instead of hours."""
UNNAMED: Final = "unnamed"

_COPIED: Final = (
    *("recording", "file", "row", "flow_id", "src_ip", "src_port"),
    *("dst_ip", "dst_port", "transport", "time"),
)


class Group(Frozen):
    """Alerts that share something."""

    name: str
    alerts: int
    warm_up: int
    """Of them raised in a warm-up."""
    types: dict[str, int]
    """Alerts by anomaly type, the most frequent first."""
    reason: str
    """First reason of the alert with the highest score."""
    first: str
    last: str
    """RFC 3339, of the first alarms."""


class Alert(Frozen):
    """A flow called malicious, as the report that raised the alarm showed it."""

    time: str
    """RFC 3339, of the first alarm."""
    recording: str
    file: str
    row: int
    flow_id: str
    source: str
    destination: str
    transport: str
    anomaly_score: float
    anomaly_type: str
    baseline_window: str
    warm: bool
    reasons: tuple[str, ...]


class Recording(Frozen):
    """One recording."""

    name: str
    first: str
    last: str
    """RFC 3339, of its reports."""
    warm_from: str | None
    """When its baseline was past the warm-up; None: never."""
    reports: int
    flows: int
    alerts: int


class Scored(Frozen):
    """Verdicts of labelled flows against one label set."""

    flows: int
    counts: Counts
    rates: Rates
    families: dict[str, Share]


class Scores(Frozen):
    """The same for all labelled flows, and for those first reported after the warm-up."""

    all_flows: Scored
    after_warm_up: Scored


class VerdictSummary(Frozen):
    """Everything that the page and the printed text say."""

    model_version: str
    model: str
    view: str
    view_version: str
    detector: str
    """SHA-256 (hex) of what decides."""
    threshold: float
    reports: int
    flows: int
    alerts: int
    warm_up_alerts: int
    cold_flows: int
    """Flows first reported in the warm-up."""
    rows: dict[str, int]
    """The account of rows of the step validate."""
    recordings: tuple[Recording, ...]
    types: tuple[Group, ...]
    sources: tuple[Group, ...]
    destinations: tuple[Group, ...]
    services: tuple[Group, ...]
    times: tuple[Group, ...]
    bin_minutes: int
    """Width of the times."""
    first_alerts: tuple[Alert, ...]
    quarantine: dict[str, int]
    """Rows by reason; a row may have several."""
    labelled: int
    """Flows with a label."""
    scores: dict[Labels, Scores]
    """Empty without labels; one label set where the corrected ones do not differ."""


def verdict_table(reports: pd.DataFrame, detector: Detector, model_version: str) -> pd.DataFrame:
    """Judge reports and say which report each verdict is of.

    Args:
        reports: canonical reports, whole recordings.
        detector: what judges.
        model_version: its version.

    Returns:
        One row per report, same index: where it was read, flow id, ends, transport and time as reported, then the
        columns of `Detector.verdicts` (`flow`: number of the flow), `model_version` and `view_version`. `reasons` is
        JSON text as in a verdict of the service, missing for benign ones.
    """
    verdicts = detector.verdicts(reports)
    table = reports[list(_COPIED)].copy()
    malicious = np.flatnonzero(verdicts["label"].to_numpy() == MALICIOUS)
    reasons = np.full(len(table), None, object)
    reasons[malicious] = [_json(found) for found in verdicts["reasons"].to_numpy()[malicious].tolist()]
    for name in ("flow", "label", "anomaly_score", "threshold", "anomaly_type", "baseline_window", "warm"):
        table[name] = verdicts[name]
    for name in ("label", "anomaly_type", "baseline_window"):
        table[name] = table[name].astype("category")
    table["first_alarm"] = verdicts["first_alarm"]
    for name, value in (("model_version", model_version), ("view_version", detector.manifest.version)):
        table[name] = pd.Series(value, index=table.index, dtype="category")
    table["reasons"] = pd.Series(reasons, index=table.index, dtype="string[pyarrow]")
    return table


def _json(reasons: Sequence[dict[str, object]]) -> str:
    """As `serving.wire` writes them."""
    return orjson.dumps(reasons).decode()


def summarise(
    verdicts: pd.DataFrame,
    reports: pd.DataFrame,
    quarantine: pd.DataFrame,
    rows: dict[str, int],
    detector: Detector,
    model_version: str,
) -> VerdictSummary:
    """Count alerts, and score them where labels are known.

    Args:
        verdicts: of `verdict_table`.
        reports: the same reports, with label, corrected and family.
        quarantine: rows that got no verdict: file, row, reason, raw.
        rows: the account of rows.
        detector: what judged.
        model_version: its version.
    """
    flows = _Flows.of(verdicts)
    alerts = _alerts(verdicts, flows)
    recordings = _recordings(verdicts, flows, alerts)
    span = max((pd.Timestamp(r.last) - pd.Timestamp(r.first) for r in recordings), default=pd.Timedelta(0))
    minutes = 10 if span <= pd.Timedelta(hours=SHORT_HOURS) else 60
    truth = _truth(reports, verdicts["flow"].to_numpy(), flows)
    title = detector.card.get("model", {}).get("title", detector.model.family)
    return VerdictSummary(
        model_version=model_version,
        model=str(title),
        view=detector.manifest.name,
        view_version=detector.manifest.version,
        detector=detector.digest,
        threshold=detector.limit,
        reports=len(verdicts),
        flows=len(flows.last),
        alerts=len(alerts),
        warm_up_alerts=int((~alerts["warm"]).sum()),
        cold_flows=int((~flows.warm).sum()),
        rows=rows,
        recordings=recordings,
        types=_groups(alerts, alerts["anomaly_type"]),
        sources=_groups(alerts, alerts["src_ip"]),
        destinations=_groups(alerts, alerts["dst_ip"]),
        services=_groups(alerts, alerts["service"]),
        times=_by_time(alerts, minutes),
        bin_minutes=minutes,
        first_alerts=_first_alerts(alerts),
        quarantine=_by_reason(quarantine),
        labelled=truth.labelled,
        scores={labels: truth.scores(labels, flows) for labels in truth.label_sets},
    )


class _Flows(NamedTuple):
    """The flows of a verdict table; arrays [flows]."""

    first: Ints
    """Position of its first report."""
    last: Ints
    flagged: Bools
    score: Floats
    warm: Bools
    """The baseline was warm at its first report."""

    @classmethod
    def of(cls, verdicts: pd.DataFrame) -> _Flows:
        flow = verdicts["flow"].to_numpy(np.int64)
        positions = np.arange(len(flow))
        first = np.zeros(int(flow.max(initial=-1)) + 1, np.int64)
        last = first.copy()
        first[flow[::-1]] = positions[::-1]
        last[flow] = positions
        flagged = is_malicious(verdicts["label"])[last]
        score = verdicts["anomaly_score"].to_numpy(np.float64)[last]
        return cls(first, last, flagged, score, verdicts["warm"].to_numpy(bool)[first])


def _alerts(verdicts: pd.DataFrame, flows: _Flows) -> pd.DataFrame:
    """A row per flow called malicious, in order of the first alarm: the report that raised it, and the final score."""
    malicious = np.flatnonzero(is_malicious(verdicts["label"]))
    numbers, raised = np.unique(verdicts["flow"].to_numpy(np.int64)[malicious], return_index=True)
    kept = flows.flagged[numbers]
    alerts = verdicts.iloc[malicious[raised[kept]]].copy()
    alerts["anomaly_score"] = flows.score[numbers[kept]]
    alerts["anomaly_type"] = alerts["anomaly_type"].astype(object).fillna(UNNAMED)
    alerts["service"] = _services(verdicts, flows, numbers[kept])
    ordered: pd.DataFrame = alerts.sort_values("first_alarm", kind="stable").reset_index(drop=True)
    return ordered


def _services(verdicts: pd.DataFrame, flows: _Flows, asked: Ints) -> np.ndarray:
    """Of each asked flow the end (address and port) that is in more flows of the table, the destination if equal."""
    table = verdicts.iloc[flows.last]
    addresses = pd.Index(table["src_ip"].cat.categories).union(table["dst_ip"].cat.categories)
    ends = []
    for side in ("src", "dst"):
        code = addresses.get_indexer(table[f"{side}_ip"].cat.categories)[table[f"{side}_ip"].cat.codes.to_numpy()]
        port = table[f"{side}_port"].fillna(-1).to_numpy(np.int64)
        ends.append(code.astype(np.int64) << 17 | (port + 1))
    _, place, seen = np.unique(np.concatenate(ends), return_inverse=True, return_counts=True)
    source, destination = (seen[part][asked] for part in np.split(place, 2))
    chosen = np.where(source > destination, ends[0][asked], ends[1][asked])
    return np.array([_end(addresses[end >> 17], (end & 0x1FFFF) - 1) for end in chosen.tolist()], object)


def _end(address: object, port: int) -> str:
    """Address and port, or the address alone."""
    text = plain(address)
    if port < 0:
        return text
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _groups(alerts: pd.DataFrame, key: pd.Series, most: int = TOP) -> tuple[Group, ...]:
    """The groups with the most alerts."""
    names = key.astype(object)
    counts = names.value_counts().sort_index(key=lambda index: index.astype(str))
    top = counts.sort_values(ascending=False, kind="stable").head(most)
    return tuple(_group(str(name), alerts[names.to_numpy() == name]) for name in top.index)


def _group(name: str, alerts: pd.DataFrame) -> Group:
    types = alerts["anomaly_type"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    reasons = _texts(alerts["reasons"].iloc[int(alerts["anomaly_score"].to_numpy().argmax())])
    return Group(
        name=name,
        alerts=len(alerts),
        warm_up=int((~alerts["warm"]).sum()),
        types={str(name): int(number) for name, number in types.items()},
        reason=reasons[0] if reasons else "",
        first=_time(alerts["first_alarm"].iloc[0]),
        last=_time(alerts["first_alarm"].iloc[-1]),
    )


def _by_time(alerts: pd.DataFrame, minutes: int) -> tuple[Group, ...]:
    """The times with the most alerts, in order."""
    begins = alerts["first_alarm"].dt.floor(f"{minutes}min")
    return tuple(sorted(_groups(alerts, begins.map(_time), 24), key=lambda group: group.name))


def _first_alerts(alerts: pd.DataFrame) -> tuple[Alert, ...]:
    rows: list[dict[str, Any]] = alerts.head(FIRST_ALERTS).astype(object).to_dict("records")  # type: ignore[assignment]
    return tuple(
        Alert(
            time=_time(row["first_alarm"]),
            recording=str(row["recording"]),
            file=str(row["file"]),
            row=int(row["row"]),
            flow_id=str(row["flow_id"]),
            source=_end(row["src_ip"], _number(row["src_port"])),
            destination=_end(row["dst_ip"], _number(row["dst_port"])),
            transport=_text(row["transport"]),
            anomaly_score=float(row["anomaly_score"]),
            anomaly_type=str(row["anomaly_type"]),
            baseline_window=_text(row["baseline_window"]),
            warm=bool(row["warm"]),
            reasons=tuple(_texts(row["reasons"])),
        )
        for row in rows
    )


def _number(port: Any) -> int:
    return -1 if pd.isna(port) else int(port)


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _texts(reasons: Any) -> list[str]:
    return [] if pd.isna(reasons) else [str(reason["text"]) for reason in json.loads(str(reasons))]


def _time(moment: pd.Timestamp) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S}Z"


def _recordings(verdicts: pd.DataFrame, flows: _Flows, alerts: pd.DataFrame) -> tuple[Recording, ...]:
    names = verdicts["recording"]
    of_flow = names.iloc[flows.first].value_counts()
    of_alert = alerts["recording"].value_counts()
    found = []
    for name in names.unique():
        part = verdicts.loc[(names == name).to_numpy(), ["time", "warm"]]
        warm = part["time"].to_numpy()[part["warm"].to_numpy(bool)]
        found.append(
            Recording(
                name=str(name),
                first=_time(part["time"].min()),
                last=_time(part["time"].max()),
                warm_from=_time(pd.Timestamp(warm[0])) if len(warm) else None,
                reports=len(part),
                flows=int(of_flow[name]),
                alerts=int(of_alert.get(name, 0)),
            )
        )
    return tuple(found)


def _by_reason(quarantine: pd.DataFrame) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reasons, number in quarantine["reason"].value_counts().items():
        for reason in str(reasons).split("; "):
            counts[reason] = counts.get(reason, 0) + int(number)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class _Truth(NamedTuple):
    """What is known of the flows; arrays [flows]."""

    known: Bools
    published: Bools
    corrected: Bools
    family: np.ndarray

    @property
    def labelled(self) -> int:
        return int(self.known.sum())

    @property
    def label_sets(self) -> tuple[Labels, ...]:
        """The corrected ones alone if they say the same."""
        if not self.labelled:
            return ()
        return LABELS if (self.published != self.corrected).any() else ("corrected",)

    def scores(self, labels: Labels, flows: _Flows) -> Scores:
        malicious: Bools = self.corrected if labels == "corrected" else self.published
        return Scores(
            all_flows=self._scored(malicious, flows, self.known),
            after_warm_up=self._scored(malicious, flows, self.known & flows.warm),
        )

    def _scored(self, malicious: Bools, flows: _Flows, asked: Bools) -> Scored:
        truth, flagged = malicious[asked], flows.flagged[asked]
        counts = count(truth, flagged)
        names, family = np.unique(self.family[malicious & asked].astype(str), return_inverse=True)
        whole = np.bincount(family, minlength=len(names))
        found = np.bincount(family[flagged[truth]], minlength=len(names))
        return Scored(
            flows=len(truth),
            counts=counts,
            rates=rates(counts, truth, flows.score[asked]),
            families={
                str(name): share(int(of), int(hit)) for name, of, hit in zip(names, whole, found, strict=True) if of
            },
        )


def _truth(reports: pd.DataFrame, flow: Ints, flows: _Flows) -> _Truth:
    """A flow is malicious as published if any of its reports is, as in `collapse`."""
    last = reports.iloc[flows.last]
    malicious = is_malicious(reports["label"])
    published = np.bincount(flow[malicious], minlength=len(flows.last)) > 0
    family = last["family"].astype(object).fillna(GENERIC_FAMILY).to_numpy()
    return _Truth(
        last["corrected"].notna().to_numpy(bool), published, is_malicious(last["corrected"]), np.asarray(family)
    )


def verdicts_html(summary: VerdictSummary, verdicts: pd.DataFrame) -> str:
    """One self-contained page.

    Args:
        summary: of `verdicts`.
        verdicts: of `verdict_table`, for the chart.
    """
    return render(
        "verdict_summary.html.j2",
        summary=summary,
        chart=_chart(summary, verdicts),
        scopes={"all_flows": "all flows", "after_warm_up": "after the warm-up"},
        tops=(
            ("Anomaly types", "what the leading reason stands for", summary.types),
            ("Sources", "source address, as reported", summary.sources),
            ("Destinations", "destination address, as reported", summary.destinations),
            ("Services", "the end (address and port) that is in more flows", summary.services),
            ("Times", f"by {_width(summary.bin_minutes)} of the first alarm, UTC", summary.times),
        ),
    )


def _width(minutes: int) -> str:
    return "hour" if minutes == 60 else f"{minutes} minutes"


def _chart(summary: VerdictSummary, verdicts: pd.DataFrame) -> object:
    flows = _Flows.of(verdicts)
    if not len(flows.first):
        return None
    alerts = _alerts(verdicts, flows)
    firsts = verdicts[["recording", "time"]].iloc[flows.first]
    chosen = sorted(summary.recordings, key=lambda recording: -recording.alerts)[:CHARTED_RECORDINGS]
    panels = []
    for recording in chosen:
        own = (alerts["recording"] == recording.name).to_numpy()
        panels.append(
            charts.AlertPanel(
                title=recording.name,
                flows=pd.DatetimeIndex(firsts["time"][(firsts["recording"] == recording.name).to_numpy()]),
                alerts=pd.DatetimeIndex(alerts["first_alarm"][own]),
                warm=alerts["warm"].to_numpy(bool)[own],
                warm_from=None if recording.warm_from is None else pd.Timestamp(recording.warm_from),
            )
        )
    return charts.alerts(panels)


def verdicts_text(summary: VerdictSummary) -> str:
    """The same in a few lines for a terminal."""
    lines = [
        f"{summary.alerts:,} of {summary.flows:,} flows are malicious by model version {summary.model_version} "
        f"({plain(summary.model)}, view {summary.view})"
    ]
    if summary.warm_up_alerts:
        lines.append(f"{summary.warm_up_alerts:,} of them were raised in a warm-up, before the baseline was known")
    if summary.alerts:
        tops = (("types", summary.types), ("sources", summary.sources), ("services", summary.services))
        for title, groups in tops:
            lines.append(f"  {title:<13}{', '.join(f'{plain(g.name)} ({g.alerts:,})' for g in groups[:4])}")
    if quarantined := summary.rows.get("quarantined"):
        lines.append(f"{quarantined:,} rows are quarantined and have no verdict")
    if not summary.scores:
        lines.append("The flows have no labels, so nothing can be said of how right this is")
    for labels, scores in summary.scores.items():
        lines += ["", *_scores_text(labels, scores)]
    return "\n".join(lines)


_RATES: Final = {"recall": "recall", "precision": "precision", "fpr": "FPR", "balanced_accuracy": "balanced"}


def _scores_text(labels: Labels, scores: Scores) -> list[str]:
    columns = ("found", "missed", "false", "left alone", *_RATES.values())
    lines = [f"Against the {labels} labels, in flows and %:"]
    lines.append(f"{'':<20}{''.join(f'{name:>11}' for name in columns)}")
    for title, scored in (("all flows", scores.all_flows), ("after the warm-up", scores.after_warm_up)):
        counts = scored.counts
        cells = [f"{number:,}" for number in (counts.tp, counts.fn, counts.fp, counts.tn)]
        cells += [percent(getattr(scored.rates, name)) for name in _RATES]
        lines.append(f"{title:<20}{''.join(f'{cell:>11}' for cell in cells)}")
    families = scores.all_flows.families
    width = max([20, *(len(name) + 2 for name in families)])
    for name, found in sorted(families.items(), key=lambda item: -item[1].flows):
        lines.append(f"  {plain(name):<{width}}{percent(found.rate):>7} of {found.flows:,}")
    return lines
