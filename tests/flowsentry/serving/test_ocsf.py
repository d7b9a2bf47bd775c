"""Findings for a SIEM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pandas as pd
import pytest

from flowsentry.serving import ocsf, wire
from flowsentry.serving.ocsf import HIGH, INFORMATIONAL, LOW, MEDIUM, findings, severity
from flowsentry.serving.protocol import JSON
from tests.flowsentry.tables import make_reports
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

REASONS = [{"feature": "edge_burst", "value": 51.0, "unit": "ratio", "share": 0.8, "text": "51 times as many flows"}]
ALARM = "2024-03-01T00:00:10.250Z"
FLOWS = make_reports(
    [
        {"flow_id": "a", "at": 0},
        {"flow_id": "b", "at": 10.5, "src_ip": "fe80::1", "dst_ip": "fe80::2", "duration": 500_000_000},
        {"flow_id": "c", "at": 20, "transport": "icmp", "src_port": None, "dst_port": None},
        {"flow_id": "b", "at": 30, "src_ip": "fe80::1", "dst_ip": "fe80::2"},
    ]
)


def verdicts(**changes: Any) -> pd.DataFrame:
    one = {
        "label": "malicious", "anomaly_score": 4.5, "threshold": 3.0, "anomaly_type": "burst", "warm": True,
        "baseline_window": "history", "first_alarm": ALARM, "model_version": "7", "view_version": "2",
        "reasons": REASONS,
    }  # fmt: skip
    benign = one | {"label": "benign", "anomaly_type": None, "first_alarm": None, "reasons": []}
    return pd.DataFrame([benign, one | changes, one | changes, one | changes])


def test_malicious_verdicts_become_detection_findings_with_all_that_the_schema_requires() -> None:
    found = [orjson.loads(line) for line in findings(verdicts(), FLOWS)]
    assert len(found) == 3
    for finding in found:
        assert finding["class_uid"] == 2004
        assert finding["category_uid"] == 2
        assert finding["type_uid"] == 200_400 + finding["activity_id"]
        assert finding["metadata"]["version"].startswith("1.")
        assert {"name", "vendor_name"} <= set(finding["metadata"]["product"])
        assert finding["time"] == pd.Timestamp(ALARM).value // 10**6
        assert {"uid", "title"} <= set(finding["finding_info"])
        assert finding["finding_info"]["analytic"]["type_id"] == 4
        assert finding["evidences"][0]["connection_info"]["direction_id"] == 0
        assert finding["unmapped"]["reasons"] == REASONS
    first, icmp, _ = found
    assert first["severity_id"] == MEDIUM
    assert first["message"] == "burst: tcp from [fe80::1]:40000 to [fe80::2]:80"
    assert first["finding_info"]["desc"] == "51 times as many flows"
    assert first["end_time"] - first["start_time"] == 500
    assert first["evidences"][0]["src_endpoint"] == {"ip": "fe80::1", "port": 40_000}
    assert first["evidences"][0]["connection_info"]["protocol_num"] == 6
    assert first["evidences"][0]["connection_info"]["protocol_ver_id"] == 6
    assert icmp["evidences"][0]["dst_endpoint"] == {"ip": "10.0.0.2"}
    assert icmp["message"] == "burst: icmp from 10.0.0.1 to 10.0.0.2"


def test_later_reports_of_a_flow_update_its_finding() -> None:
    found = [orjson.loads(line) for line in findings(verdicts(), FLOWS)]
    assert [finding["activity_name"] for finding in found] == ["Create", "Create", "Update"]
    assert found[0]["finding_info"]["uid"] == found[2]["finding_info"]["uid"] != found[1]["finding_info"]["uid"]


@pytest.mark.parametrize(
    ("score", "warm", "expected"),
    [(3.0, True, LOW), (3.99, True, LOW), (4.0, True, MEDIUM), (5.9, True, MEDIUM), (6.0, True, HIGH),
     (12.0, True, HIGH), (12.0, False, INFORMATIONAL)],
)  # fmt: skip
def test_the_severity_grows_with_rarity_beyond_the_threshold(score: float, warm: bool, expected: int) -> None:
    assert severity(score, 3.0, warm) == expected
    line = next(findings(verdicts(anomaly_score=score, warm=warm), FLOWS))
    assert orjson.loads(line)["severity"] == ocsf.SEVERITIES[expected]


def test_reasons_may_be_json_text_and_no_alarm_is_no_finding() -> None:
    text = verdicts().assign(reasons=orjson.dumps(REASONS).decode())
    assert list(findings(text, FLOWS)) == list(findings(verdicts(), FLOWS))
    assert list(findings(verdicts(label="benign"), FLOWS)) == []


def test_verdicts_of_the_service_become_findings(small: Small) -> None:
    detector = trained(small)
    reports = small.raw.iloc[:3000]
    batch = wire.Batch(None, reports["row"].to_numpy(), reports["flow_id"].tolist(), [], len(reports))  # type: ignore[arg-type]
    judged = detector.watch().take(wire.Columns.of(reports))
    head = wire.Head("s", 1, 1, "7", "behaviour", "2", detector.limit)
    table = pd.DataFrame(orjson.loads(wire.answer(JSON, head, judged, batch))["verdicts"])
    found = [orjson.loads(line) for line in findings(table, reports)]
    assert len(found) == judged.malicious.sum() > 0
    assert {finding["severity_id"] for finding in found} <= set(ocsf.SEVERITIES)
