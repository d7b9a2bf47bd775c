from __future__ import annotations

import pytest

from flowsentry.config import QualityGateSettings, ServiceGateSettings
from flowsentry.learning.quality_gate import (
    BaselineScores,
    FamilyFigure,
    Figure,
    QualityDecision,
    Rule,
    Scores,
)
from flowsentry.learning.quality_gate import Difference as Gain
from flowsentry.reporting.gates import gates_html
from flowsentry.reporting.metrics import Counts, share
from flowsentry.serving.service_gate import Difference, Figures, Latency, Said, ServiceDecision, Verdict

EVIL = "<script>alert(1)</script>\x1b[2J"


def scores(version: str, recall: float) -> Scores:
    return Scores(
        version=version,
        metric=Figure(value=recall, low=recall - 0.01, high=recall + 0.01),
        fpr=Figure(value=0.002, low=None, high=None),
        families={EVIL: FamilyFigure(flows=1234, recall=Figure(value=0.5, low=0.4, high=0.6))},
        counts=Counts(tp=1, fp=0, tn=1, fn=0),
    )


@pytest.fixture
def quality() -> QualityDecision:
    gain = Figure(value=-0.02, low=-0.03, high=0.01)
    return QualityDecision(
        passed=True,
        reason="good enough",
        basis="champion",
        basis_reason="compared with the champion 6 of ZenML",
        champion_digest="cd" * 32,
        metric="recall",
        labels="corrected",
        benign=10,
        malicious=20,
        validation=35,
        seen_by_champion=5,
        challenger=scores("7", 0.9123),
        champion=scores("6", 0.9323),
        difference=Gain(metric=gain, fpr=gain, families={EVIL: gain}),
        baselines=(
            BaselineScores(name="it", title="Best single column", uses_identity=False, metric=0.4, fpr=0.0),
            BaselineScores(name="id", title="Flow id alone", uses_identity=True, metric=0.99, fpr=None),
        ),
        rules=(
            Rule(name="recall not worse", outcome="passed", words=EVIL, figures={}),
            Rule(name=f"family {EVIL} not worse", outcome="not decided", words="few", figures={}),
        ),
        settings=QualityGateSettings(),
    )


@pytest.fixture
def service() -> ServiceDecision:
    verdict = Verdict(
        label="benign",
        anomaly_score=0.25,
        threshold=3.0,
        warm=True,
        first_alarm=None,
        flow_id="one",
        model_version="7",
        view_version="1",
        anomaly_type=None,
        baseline_window=None,
        reasons=(Said(feature="bytes", value=1.0, unit="", share=1.0, text=f"much {EVIL}"),),
    )
    figures = Figures(counts=Counts(tp=3, fp=0, tn=9, fn=1), recall=0.75, fpr=0.0, families={EVIL: share(4, 3)})
    return ServiceDecision(
        passed=False,
        reason="same scores: 1 of 100 verdicts differ",
        model_version="7",
        detector_digest="ab" * 32,
        reports=100,
        answered=99,
        flows=50,
        requests=12,
        seconds=0.5,
        latency=Latency(requests=10, p50_ms=2.0, p99_ms=31.5),
        differing={"score": 1},
        differences=(
            Difference(
                report=f"{EVIL}.csv:17",
                flow=4,
                kinds=("label", "score", "flow id", "reasons"),
                expected=verdict,
                got=verdict.model_copy(update={"label": EVIL, "first_alarm": "2024-03-01T00:00:00.000Z"}),
            ),
        ),
        offline={"corrected": figures},
        served={"corrected": figures.model_copy(update={"families": {}})},
        rules=(Rule(name="same scores", outcome="failed", words="1 of 100 verdicts differ", figures={}),),
        log=f"last line {EVIL}",
        settings=ServiceGateSettings(),
    )


def test_the_page_tells_both_decisions_with_their_figures(quality: QualityDecision, service: ServiceDecision) -> None:
    page = gates_html(quality, service)
    for said in (
        "model version 7", "It may not take the champion", "same scores: 1 of 100 verdicts differ",
        "91.23", "93.23", "-2.00", "1,234", "Best single column", "31.5 ms", ".csv:17",
        "label, score, flow id, reasons", "3 of 4", "flow id: one", "reasons: bytes (much ", "last line",
        "Compared with the champion 6 of ZenML",
    ):  # fmt: skip
        assert said in page
    assert page.count('<span class="tag">failed</span>') == 1
    assert page.count('<span class="tag plain">not decided</span>') == 1


def test_the_page_is_escaped(quality: QualityDecision, service: ServiceDecision) -> None:
    page = gates_html(quality, service)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_challenger_that_passed_both_may_take_over(quality: QualityDecision, service: ServiceDecision) -> None:
    page = gates_html(quality, service.model_copy(update={"passed": True, "differences": (), "log": None}))
    assert "It may take the champion" in page
    assert "Last lines" not in page
    assert "another one than offline" not in page


def test_a_gate_that_was_not_reached_has_not_been_passed(quality: QualityDecision, service: ServiceDecision) -> None:
    refused = gates_html(quality.model_copy(update={"passed": False, "reason": "recall bar: too low"}), None)
    assert "recall bar: too low" in refused
    for page in (refused, gates_html(quality, None), gates_html(None, service), gates_html(None, None)):
        assert "not reached" in page
        assert "It may take" not in page


def test_without_a_champion_there_is_nothing_beside_the_challenger(quality: QualityDecision) -> None:
    page = gates_html(quality.model_copy(update={"champion": None, "difference": None, "seen_by_champion": None}), None)
    assert "91.23" in page
    assert "champion 6</th>" not in page
    assert "difference</th>" not in page
