from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowsentry.monitoring.figures import Finding, Standing
from flowsentry.monitoring.journal import Header, Journal, Model
from flowsentry.monitoring.replay import ReplaySummary
from flowsentry.reporting.replay_summary import ReplayReport, replay_text, report

HOSTILE = "<script>alert(1)</script>"


Answer = tuple[str, str | None, str]
"""Expected, family, verdict."""


def told(folder: Path, verdicts: list[Answer], findings: tuple[Finding, ...] = ()) -> ReplaySummary:
    """A finished replay, a flow an answer; the first two are in the warm-up."""
    path = folder / "it.replay"
    header = Header("s", HOSTILE, "0", len(verdicts), "max", "http://127.0.0.1:1", 0.0)
    rows: list[dict[str, Any]] = [
        {
            "position": i,
            "flow": i,
            "flow_id": f"flow {i}",
            "time": 0,
            "src_ip": None,
            "dst_ip": None,
            "src_port": None,
            "dst_port": None,
            "transport": None,
            "expected": expected,
            "family": family,
            "verdict": verdict,
            "rejected": None,
            "anomaly_score": 0.0,
            "threshold": 2.0,
            "warm": i > 1,
            "anomaly_type": None,
            "reason": None,
            "request": i,
            "latency_ms": 2.0,
            "sent": i,
        }
        for i, (expected, family, verdict) in enumerate(verdicts)
    ]
    with Journal.create(path, header) as journal:
        journal.add_model(Model(0, "7", {}))
        journal.add(rows)
        journal.finish()
    return ReplaySummary(path, len(rows), 0, 3, 1.5, Standing(0, 0, 0, 0), findings)


MIXED: list[Answer] = [
    ("malicious", "flood", "benign"),
    ("benign", None, "benign"),
    ("malicious", "flood", "malicious"),
    ("malicious", HOSTILE, "malicious"),
    ("benign", None, "malicious"),
    ("benign", None, "benign"),
]


def test_scores_stand_beside_those_of_constant_answers(tmp_path: Path) -> None:
    found, page = report(told(tmp_path, MIXED))
    service, warm, benign, malicious = found.answers
    assert (service.counts.tp, service.counts.fn, service.counts.fp, service.counts.tn) == (2, 1, 1, 2)
    assert service.balanced_accuracy == pytest.approx(2 / 3)
    assert (warm.counts.tp, warm.counts.fn, warm.counts.fp, warm.counts.tn) == (2, 0, 1, 1)
    assert (benign.counts.fn, benign.recall, malicious.counts.fp, malicious.recall) == (3, 0.0, 3, 1.0)
    assert {name: (of.flows, of.flagged) for name, of in found.families.items()} == {"flood": (2, 1), HOSTILE: (1, 1)}
    assert found.after_warm_up["flood"].flows == 1
    assert found.models == {"7": 0}
    assert found.latency_ms["p50"] == pytest.approx(2.0, rel=0.06)
    text = replay_text(found)
    assert "4 flows right, 2 wrong; always saying benign would have 3 wrong" in text
    assert "3 reports were sent again" in text
    assert "As it went" in page
    assert ReplayReport.model_validate_json(found.model_dump_json()) == found


def test_findings_are_at_the_top_of_the_page_and_everything_is_escaped(tmp_path: Path) -> None:
    finding = Finding("constant", "bad", f"Every flow was called benign {HOSTILE}")
    found, page = report(told(tmp_path, MIXED, (finding,)))
    assert page.index('<p class="finding bad"><b>Constant.</b>') < page.index('<div class="tiles">')
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "BAD: Every flow was called benign" in replay_text(found)
