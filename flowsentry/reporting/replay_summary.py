"""What a replay says of the live service: scores by family beside constant answers, findings, latency."""

from __future__ import annotations

from typing import Final, Literal

from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.monitoring import figures
from flowsentry.monitoring.figures import Standing, Tally
from flowsentry.monitoring.journal import Reader
from flowsentry.monitoring.replay import ReplaySummary, tally
from flowsentry.reporting import charts
from flowsentry.reporting.metrics import Counts, Frozen, Share, share
from flowsentry.reporting.pages import render
from flowsentry.reporting.tables import percent, plain


class Answers(Frozen):
    """Right and wrong answers of some flows; a rate without flows is None."""

    title: str
    counts: Counts
    accuracy: float | None
    recall: float | None
    precision: float | None
    fpr: float | None
    balanced_accuracy: float | None


class Finding(Frozen):
    """Something that must not be overlooked."""

    code: str
    severity: Literal["bad", "note"]
    text: str


class ReplayReport(Frozen):
    """Everything that the page and the printed text say."""

    endpoint: str
    source: str
    pace: str
    journal: str
    models: dict[str, int]
    """Model versions that answered, and the position of the first report of each."""
    reports: int
    flows: int
    rejected: int
    resent: int
    unlabelled: int
    seconds: float
    answers: tuple[Answers, ...]
    """Of all labelled flows, of those after the warm-up, and what two constant models would have answered."""
    families: dict[str, Share]
    after_warm_up: dict[str, Share]
    latency_ms: dict[str, float | None]
    """Median and 99th percentile of the requests."""
    findings: tuple[Finding, ...]


LATENCIES: Final = {"p50": 0.5, "p99": 0.99}


def report(summary: ReplaySummary) -> tuple[ReplayReport, str]:
    """What a finished replay says, and the same as one self-contained page."""
    scores, models = tally(summary.journal)
    with Reader(summary.journal) as reader:
        header = reader.header
    everything = scores.standing
    found = ReplayReport(
        endpoint=header.endpoint,
        source=header.source,
        pace=header.pace,
        journal=str(summary.journal),
        models={model.version: model.position for model in reversed(models)},
        reports=summary.reports,
        flows=scores.flows,
        rejected=summary.rejected,
        resent=summary.resent,
        unlabelled=scores.unlabelled.flows,
        seconds=summary.seconds,
        answers=(
            _answers("the service", everything),
            _answers("the service, after the warm-up", scores.warm_standing),
            _answers("always benign", everything.always(BENIGN)),
            _answers("always malicious", everything.always(MALICIOUS)),
        ),
        families=_families(scores, warm=False),
        after_warm_up=_families(scores, warm=True),
        latency_ms={name: scores.latency(quantile) for name, quantile in LATENCIES.items()},
        findings=tuple(
            Finding(code=finding.code, severity=finding.severity, text=finding.text) for finding in summary.findings
        ),
    )
    history = scores.history()
    chart = charts.answers(history) if len(history) else None
    return found, render("replay.html.j2", report=found, chart=chart, window=figures.WINDOW)


def _answers(title: str, standing: Standing) -> Answers:
    return Answers(
        title=title,
        counts=Counts(tp=standing.tp, fp=standing.fp, tn=standing.tn, fn=standing.fn),
        accuracy=standing.accuracy,
        recall=standing.recall,
        precision=standing.precision,
        fpr=standing.fpr,
        balanced_accuracy=standing.balanced_accuracy,
    )


def _families(scores: Tally, *, warm: bool) -> dict[str, Share]:
    found = {name: scores.family(name, warm=warm) for name in scores.families}
    ordered = sorted(found.items(), key=lambda item: -item[1].flows)
    return {name: share(of.flows, of.flagged) for name, of in ordered}


def replay_text(found: ReplayReport) -> str:
    """The same in a few lines for a terminal."""
    service, constant = found.answers[0], found.answers[2]
    right, wrong = service.counts.tp + service.counts.tn, service.counts.fp + service.counts.fn
    lines = [
        f"{found.reports:,} reports of {found.flows:,} flows in {found.seconds:,.0f} s to {found.endpoint}, "
        f"model version {', '.join(plain(version) for version in found.models)}",
        f"{right:,} flows right, {wrong:,} wrong; always saying benign would have {constant.counts.fn:,} wrong",
        f"recall {percent(service.recall)} %, precision {percent(service.precision)} %, FPR {percent(service.fpr)} %, "
        f"balanced accuracy {percent(service.balanced_accuracy)} %",
    ]
    width = max([20, *(len(name) + 2 for name in found.families)])
    for name, of in found.families.items():
        lines.append(f"  {plain(name):<{width}}{percent(of.rate):>7} of {of.flows:,}")
    if found.resent:
        lines.append(f"{found.resent:,} reports were sent again, as the service had lost them")
    lines += [f"{'BAD' if finding.severity == 'bad' else 'note'}: {finding.text}" for finding in found.findings]
    return "\n".join(lines)
