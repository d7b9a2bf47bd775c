from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowsentry.__main__ import main
from flowsentry.detector import Detector
from flowsentry.flows import sources
from flowsentry.simulation.files import write
from tests.flowsentry.monitoring.conftest import Service

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small


@pytest.fixture(scope="module")
def flows(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last 300 reports of the small recording, as published."""
    path = tmp_path_factory.mktemp("flows") / "flows.csv"
    packed = path.with_name("flows.csv.gz")
    write(small.raw.iloc[-300:].reset_index(drop=True), packed)
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def test_files_are_judged_as_offline(
    shared_service: Service, detector: Detector, flows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "verdicts.ndjson"
    assert main(["score", str(flows), "--endpoint", shared_service.endpoint.url, "--out", str(out)]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    offline = detector.verdicts(sources.read([flows]).reports)
    assert [v["label"] for v in verdicts] == offline["label"].tolist()
    assert [v["anomaly_score"] for v in verdicts] == offline["anomaly_score"].tolist()
    assert [(v["file"], v["row"]) for v in verdicts[:2]] == [("flows.csv", 1), ("flows.csv", 2)]
    assert "index" not in verdicts[0]
    flagged = int(offline["label"].eq("malicious").sum())
    assert f"300 verdicts: {300 - flagged} benign, {flagged} malicious" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["verdicts.ndjson"]


def test_alarms_are_written_as_ocsf_findings(
    shared_service: Service, detector: Detector, flows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "findings.ndjson"
    assert main(["score", str(flows), "--ocsf", "--endpoint", shared_service.endpoint.url, "--out", str(out)]) == 0
    findings = [json.loads(line) for line in out.read_text().splitlines()]
    reports = sources.read([flows]).reports
    alarms = detector.verdicts(reports)["label"].eq("malicious").to_numpy()
    assert len(findings) == alarms.sum() > 0
    assert {finding["class_uid"] for finding in findings} == {2004}
    sources_of_alarms = [finding["evidences"][0]["src_endpoint"]["ip"] for finding in findings]
    assert sources_of_alarms == reports["src_ip"][alarms].tolist()
    created = [finding["finding_info"]["uid"] for finding in findings if finding["activity_name"] == "Create"]
    assert len(created) == len({finding["finding_info"]["uid"] for finding in findings})


def test_rows_without_a_verdict_are_named(
    shared_service: Service, flows: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    lines = flows.read_text().splitlines()
    place = lines[0].split(",").index("_source_network_bytes")
    for row, value in ((2, "many"), (5, "-7")):
        fields = lines[row].split(",")
        fields[place] = value
        lines[row] = ",".join(fields)
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join(lines) + "\n")
    assert main(["score", str(bad), "--endpoint", shared_service.endpoint.url]) == 0
    out, error = capfdbinary.readouterr()
    assert [json.loads(line)["row"] for line in out.splitlines()][:4] == [1, 3, 4, 6]
    told = error.decode()
    assert "bad.csv:2: no verdict: " in told
    assert "bad.csv:5: no verdict: " in told
    assert "298 verdicts" in told
    assert "2 rows have none" in told


def test_a_file_that_cannot_be_written_is_told_before_anything_is_sent(
    shared_service: Service, flows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "no" / "verdicts.ndjson"
    assert main(["score", str(flows), "--endpoint", shared_service.endpoint.url, "--out", str(out)]) == 1
    assert "--out" in capsys.readouterr().err


def test_an_unfinished_file_is_not_left(flows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowsentry.monitoring.replay.PATIENCE_SECONDS", 0.2)
    out = tmp_path / "verdicts.ndjson"
    assert main(["score", str(flows), "--endpoint", "http://127.0.0.1:9", "--out", str(out)]) == 1
    assert list(tmp_path.iterdir()) == []
