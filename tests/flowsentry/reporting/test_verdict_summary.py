from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pandas as pd
import pytest

from flowsentry.detector import Detector
from flowsentry.flows.columns import Columns
from flowsentry.reporting.verdict_files import write_ndjson
from flowsentry.reporting.verdict_summary import VerdictSummary, summarise, verdict_table, verdicts_html, verdicts_text
from flowsentry.serving import wire
from flowsentry.serving.protocol import NDJSON
from tests.flowsentry.tables import START, make_reports
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

HOSTILE = "<script>alert(1)</script>"
NO_ROWS = pd.DataFrame(columns=["file", "row", "reason", "raw"], dtype=str)


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small)


def judged(rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reports and their verdicts from partial rows: `flow`, `malicious`, `score`, `warm`, `alarm` (seconds), `says`."""
    own = ("flow", "malicious", "score", "warm", "alarm", "says", "corrected", "family")
    reports = make_reports([{key: value for key, value in row.items() if key not in own} for row in rows])
    reports = reports.assign(
        corrected=pd.Series([row.get("corrected", row.get("label", "benign")) for row in rows], dtype="category"),
        family=pd.Series([row.get("family") for row in rows], dtype="category"),
    )
    verdicts = reports.drop(columns=["bytes", "duration", "final", "label", "corrected", "family"])
    malicious = [row.get("malicious", False) for row in rows]
    verdicts["flow"] = [row["flow"] for row in rows]
    verdicts["label"] = pd.Categorical(["malicious" if bad else "benign" for bad in malicious])
    pairs = list(zip(rows, malicious, strict=True))
    verdicts["anomaly_score"] = [row.get("score", 5.0 if bad else 0.0) for row, bad in pairs]
    verdicts["anomaly_type"] = pd.Categorical(["burst" if bad else None for bad in malicious])
    verdicts["baseline_window"] = pd.Categorical(["60s" if bad else None for bad in malicious])
    verdicts["warm"] = [row.get("warm", True) for row in rows]
    alarms = [START + pd.Timedelta(seconds=row.get("alarm", 0)) if bad else None for row, bad in pairs]
    verdicts["first_alarm"] = pd.Series(alarms, dtype="datetime64[ms, UTC]")
    texts = [orjson.dumps([{"text": row.get("says", "many flows")}]).decode() if bad else None for row, bad in pairs]
    verdicts["reasons"] = pd.Series(texts, dtype="string[pyarrow]")
    return reports, verdicts


def summary_of(rows: list[dict[str, Any]], detector: Detector, quarantine: pd.DataFrame = NO_ROWS) -> VerdictSummary:
    reports, verdicts = judged(rows)
    account = {"read": len(rows) + len(quarantine), "quarantined": len(quarantine)}
    return summarise(verdicts, reports, quarantine, account, detector, "7")


def test_a_flow_counts_once_and_is_told_as_the_report_that_raised_the_alarm_showed_it(detector: Detector) -> None:
    rows: list[dict[str, Any]] = [
        {"flow": 0},
        {"flow": 1},
        {"flow": 1, "malicious": True, "alarm": 20, "says": "first sight", "score": 4.0},
        {"flow": 1, "malicious": True, "alarm": 20, "says": "later", "score": 6.0},
        {"flow": 2, "malicious": True, "alarm": 5},
        {"flow": 2, "malicious": False},
    ]
    found = summary_of(rows, detector)
    assert (found.reports, found.flows, found.alerts) == (6, 3, 1)
    (alert,) = found.first_alerts
    assert (alert.row, alert.reasons, alert.anomaly_score) == (3, ("first sight",), 6.0)
    assert alert.time == "2024-03-01T00:00:20Z"
    assert [group.alerts for group in found.types] == [1]


def test_groups_are_told_by_number_of_alerts_with_the_reason_of_the_highest_score(detector: Detector) -> None:
    rows = [
        {"flow": i, "malicious": True, "alarm": 60 * i, "src_ip": source, "score": float(3 + i), "says": f"reason {i}"}
        for i, source in enumerate(["10.0.0.9", "10.0.0.8", "10.0.0.8", "10.0.0.7"])
    ]
    found = summary_of(rows, detector)
    assert [(group.name, group.alerts) for group in found.sources] == [
        ("10.0.0.8", 2),
        ("10.0.0.7", 1),
        ("10.0.0.9", 1),
    ]
    first = found.sources[0]
    assert (first.reason, first.types) == ("reason 2", {"burst": 2})
    assert (first.first, first.last) == ("2024-03-01T00:01:00Z", "2024-03-01T00:02:00Z")


def test_alerts_are_counted_by_ten_minutes_or_in_a_long_recording_by_hours(detector: Detector) -> None:
    rows = [{"flow": i, "at": at, "malicious": True, "alarm": at} for i, at in enumerate([0, 599, 600, 4000])]
    found = summary_of(rows, detector)
    assert found.bin_minutes == 10
    assert [(g.name[11:16], g.alerts) for g in found.times] == [("00:00", 2), ("00:10", 1), ("01:00", 1)]
    found = summary_of([*rows, {"flow": 4, "at": 7 * 3600}], detector)
    assert found.bin_minutes == 60
    assert [(g.name[11:16], g.alerts) for g in found.times] == [("00:00", 3), ("01:00", 1)]


def test_the_service_is_the_end_that_is_in_more_flows_whichever_way_it_was_reported(detector: Detector) -> None:
    service = {"dst_ip": "10.0.0.2", "dst_port": 80}
    rows: list[dict[str, Any]] = [{"flow": i, "src_port": 40000 + i, **service} for i in range(3)]
    reverse = {"src_ip": "10.0.0.2", "src_port": 80, "dst_ip": "10.0.0.1", "dst_port": 41000}
    rows.append({"flow": 3, "malicious": True, **reverse})
    ping = {"src_port": None, "dst_port": None, "transport": "icmp", "dst_ip": "fd00::2"}
    rows.append({"flow": 4, "malicious": True, **ping})
    rows.append({"flow": 5, "malicious": True, "src_port": 50000, "dst_ip": "fd00::2", "dst_port": 443})
    found = summary_of(rows, detector)
    assert [group.name for group in found.services] == ["10.0.0.2:80", "[fd00::2]:443", "fd00::2"]
    assert [alert.source for alert in found.first_alerts] == ["10.0.0.2:80", "10.0.0.1", "10.0.0.1:50000"]


def test_alerts_in_the_warm_up_are_counted_apart_and_said_so(detector: Detector) -> None:
    rows = [
        {"flow": 0, "warm": False, "malicious": True},
        {"flow": 1, "warm": False},
        {"flow": 2, "malicious": True, "alarm": 30},
    ]
    found = summary_of(rows, detector)
    assert (found.warm_up_alerts, found.cold_flows) == (1, 2)
    assert found.recordings[0].warm_from == "2024-03-01T00:00:20Z"
    assert [alert.warm for alert in found.first_alerts] == [False, True]
    assert "1 of them were raised in a warm-up" in verdicts_text(found)
    _, verdicts = judged(rows)
    page = verdicts_html(found, verdicts)
    assert '<span class="tag">warm-up</span>' in page
    assert "alerts in the warm-up" in page


def test_scores_are_of_labelled_flows_by_their_last_report(detector: Detector) -> None:
    rows: list[dict[str, Any]] = [
        {"flow": 0, "label": "malicious", "family": "flood", "malicious": True},
        {"flow": 1, "label": "malicious", "family": "flood", "warm": False},
        {"flow": 2, "label": "malicious", "family": "shell", "malicious": False},
        {"flow": 2, "label": "malicious", "family": "shell", "malicious": True},
        {"flow": 3, "label": "benign", "malicious": True},
        {"flow": 4, "label": "benign"},
        {"flow": 5, "label": None, "malicious": True},
    ]
    found = summary_of(rows, detector)
    assert (found.flows, found.labelled, found.alerts) == (6, 5, 4)
    (labels,) = found.scores
    assert labels == "corrected"
    scored = found.scores[labels].all_flows
    assert (scored.counts.tp, scored.counts.fn, scored.counts.fp, scored.counts.tn) == (2, 1, 1, 1)
    assert scored.rates.recall == pytest.approx(2 / 3)
    assert scored.rates.precision == pytest.approx(2 / 3)
    assert scored.rates.fpr == 0.5
    assert {name: (of.flows, of.flagged) for name, of in scored.families.items()} == {"flood": (2, 1), "shell": (1, 1)}
    warm = found.scores[labels].after_warm_up
    assert (warm.counts.tp, warm.counts.fn) == (2, 0)
    assert "flood" in verdicts_text(found)


def test_both_label_sets_are_scored_where_corrections_differ(detector: Detector) -> None:
    rows = [
        {"flow": 0, "label": "malicious", "corrected": "malicious", "malicious": True},
        {"flow": 1, "label": "benign", "corrected": "malicious", "malicious": True},
        {"flow": 2, "label": "benign"},
    ]
    scores = summary_of(rows, detector).scores
    assert scores["published"].all_flows.counts.fp == 1
    assert scores["corrected"].all_flows.counts.tp == 2
    assert scores["corrected"].all_flows.families["attack"].flows == 2


def test_without_labels_nothing_is_scored(detector: Detector) -> None:
    rows = [{"flow": 0, "label": None, "malicious": True}, {"flow": 1, "label": None}]
    found = summary_of(rows, detector)
    assert (found.labelled, found.scores) == (0, {})
    assert "no labels" in verdicts_text(found)
    assert "How right it is" not in verdicts_html(found, judged(rows)[1])


def test_what_comes_from_outside_is_text_on_the_page_and_in_the_terminal(detector: Detector) -> None:
    rows = [
        {
            "flow": 0,
            "malicious": True,
            "flow_id": HOSTILE,
            "file": HOSTILE,
            "recording": HOSTILE,
            "src_ip": HOSTILE,
            "says": f"{HOSTILE}\x1b[31m",
        }
    ]
    bad = pd.DataFrame({"file": [HOSTILE], "row": [3], "reason": [f"{HOSTILE}; bytes is missing"], "raw": [""]})
    found = summary_of(rows, detector, bad)
    assert found.quarantine == {HOSTILE: 1, "bytes is missing": 1}
    page = verdicts_html(found, judged(rows)[1])
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)") > 5
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "\x1b" not in verdicts_text(found) + page
    assert VerdictSummary.model_validate_json(found.model_dump_json()) == found


def test_every_recording_is_a_stream_of_its_own(small: Small, detector: Detector) -> None:
    one, count = small.reports, int(small.reports["flow"].max()) + 1
    both = pd.concat([one, one.assign(recording="again")], ignore_index=True).astype({"recording": "category"})
    verdicts = verdict_table(both, detector, "7")
    found = summarise(verdicts, both, NO_ROWS, {}, detector, "7")
    first, second = found.recordings
    assert (first.flows, second.flows, found.flows) == (count, count, 2 * count)
    assert first.alerts == second.alerts > 0
    assert verdicts["anomaly_score"].iloc[: len(one)].tolist() == verdicts["anomaly_score"].iloc[len(one) :].tolist()
    page = verdicts_html(found, verdicts)
    assert "Flows, again" in page


def test_quiet_flows_make_a_quiet_page(detector: Detector) -> None:
    rows = [{"flow": i, "label": None} for i in range(3)]
    found = summary_of(rows, detector)
    assert (found.alerts, found.first_alerts, found.types, found.times) == (0, (), (), ())
    page = verdicts_html(found, judged(rows)[1])
    assert "None of 3 flows looks malicious" in page
    assert 'id="alerts"' not in page


@pytest.mark.parametrize("view", ["behaviour", "paper"])
def test_a_verdict_of_a_file_is_the_services_verdict(small: Small, tmp_path: Path, view: str) -> None:
    """Each line of NDJSON beside the same flow's line in the service's answer."""
    detector = trained(small, view, target_fpr=0.1)
    reports = small.reports
    verdicts = verdict_table(reports, detector, "7")
    assert verdicts.index.equals(reports.index)
    write_ndjson(verdicts, tmp_path / "verdicts.ndjson")
    lines = [orjson.loads(line) for line in (tmp_path / "verdicts.ndjson").read_bytes().splitlines()]
    columns = Columns.of(reports)
    batch = wire.Batch(columns, reports.index.to_numpy(), reports["flow_id"].tolist(), [], len(reports))
    head = wire.Head("default", len(reports), 0, "7", view, detector.manifest.version, detector.limit)
    body = wire.answer(NDJSON, head, detector.watch().take(columns), batch)
    answers = [orjson.loads(line) for line in body.splitlines()]
    assert sum(answer["label"] == "malicious" for answer in answers) > 10
    for line, answer, file, row in zip(lines, answers, reports["file"], reports["row"], strict=True):
        assert (line.pop("file"), line.pop("row")) == (file, row)
        del answer["index"]
        assert line == answer
