"""Whole runs of the pipeline inference, as run.py starts them, in a ZenML of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest
from zenml.client import Client
from zenml.enums import ExecutionStatus, VisualizationType

from flowsentry.detector import Detector
from flowsentry.flows.columns import Columns
from flowsentry.reporting.verdict_summary import VerdictSummary
from flowsentry.simulation.files import write
from stacks import apply
from tests.pipelines.champion import Ran, deployed, no_model, recording, refused, register, start, trained

FILES = {
    *("verdicts.parquet", "verdicts.ndjson", "findings.ndjson"),
    *("verdicts.json", "verdicts.html", "validation.html"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


@pytest.fixture(scope="module")
def other() -> Detector:
    return trained("tails")


@pytest.fixture(scope="module")
def folder(isolated_zenml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        patch.setenv("FLOWSENTRY_HOME", str(folder / "home"))
        apply.activate("local")
        (folder / "config.yaml").write_text(
            "data: simulate\nsimulation: {seed: 5, minutes: 60, scale: 0.1, episodes: 1}\n"
        )
        with no_model():
            yield folder


@pytest.fixture(scope="module")
def untrained(folder: Path) -> tuple[int, str, str]:
    """A run before there is any model."""
    return refused("inference")


@pytest.fixture(scope="module")
def versions(untrained: object, detector: Detector, other: Detector) -> tuple[str, str]:
    """Numbers of the version at stage production, with nothing deployed, and of another one."""
    champion, another = register(detector), register(other, digest="a" * 64)
    champion.set_stage("production", force=True)
    return str(champion.name), str(another.name)


@pytest.fixture(scope="module")
def labelled(versions: tuple[str, str]) -> Ran:
    return start("inference")


@pytest.fixture(scope="module")
def raw(folder: Path) -> pd.DataFrame:
    """Unlabelled rows as in a file of the published layout, two of them bad."""
    write(recording(6), folder / "flows.csv.gz")
    table = pd.read_csv(folder / "flows.csv.gz", dtype=str).drop(columns="label")
    table.loc[10, "_source_source_ip"] = "<script>alert(1)</script>"
    table.loc[20, "_source_network_bytes"] = "many"
    table.to_csv(folder / "flows.csv", index=False)
    return table


@pytest.fixture(scope="module")
def unlabelled(versions: tuple[str, str], raw: pd.DataFrame) -> Ran:
    return start("inference", "--data", "flows.csv")


def test_without_any_model_the_error_says_what_to_run(untrained: tuple[int, str, str]) -> None:
    status, out, err = untrained
    assert status == 2
    assert out == ""
    assert err == "error: no model version is in production; run python run.py --pipeline train\n"


def test_labelled_flows_get_verdicts_and_scores(labelled: Ran, versions: tuple[str, str]) -> None:
    assert labelled.status == 0, labelled.err
    assert labelled.err == ""
    assert set(labelled.states) == {"load", "validate", "detect"}
    assert labelled.files == FILES
    assert f"flows are malicious by model version {versions[0]} (decision_tree, view behaviour)" in labelled.out
    assert "Against the corrected labels, in flows and %:" in labelled.out
    for name in FILES:
        assert f"reports/{labelled.run.name}/{name}" in labelled.out
    summary = labelled.load("detect", "verdict_summary")
    assert isinstance(summary, VerdictSummary)
    scored = summary.scores["corrected"].all_flows
    assert scored.flows == summary.flows == summary.labelled
    assert scored.counts.tp + scored.counts.fp == summary.alerts > 0
    assert scored.rates.recall is not None
    assert scored.rates.recall > 0.3
    assert sum(family.flagged for family in scored.families.values()) == scored.counts.tp
    assert VerdictSummary.model_validate_json((labelled.folder / "verdicts.json").read_text()) == summary


def test_verdicts_are_those_of_a_watch_that_is_fed_one_report_at_a_time(labelled: Ran, detector: Detector) -> None:
    reports, verdicts = labelled.load("validate", "valid_reports"), labelled.load("detect", "verdicts")
    expected = detector.verdicts(reports)
    for name in ("flow", "anomaly_score", "threshold", "label", "warm", "first_alarm"):
        assert (verdicts[name].astype(object).to_numpy() == expected[name].astype(object).to_numpy()).sum() == (
            expected[name].notna().sum()
        )
    first = int(np.flatnonzero(verdicts["label"] == "malicious")[0])
    begin = max(first - 100, 0)
    watch = detector.watch()
    watch.take(Columns.of(reports.iloc[:begin]))
    for i in range(begin, begin + 300):
        judged = watch.take(Columns.of(reports.iloc[i : i + 1]))
        assert judged.score[0] == verdicts["anomaly_score"].iloc[i]
        assert judged.malicious[0] == (verdicts["label"].iloc[i] == "malicious")
        assert judged.warm[0] == verdicts["warm"].iloc[i]
    malicious = verdicts["label"].eq("malicious")
    assert verdicts["reasons"].notna().tolist() == malicious.tolist()
    told = orjson.loads(verdicts["reasons"].iloc[first])
    assert [reason["text"] for reason in told] == [r["text"] for r in expected["reasons"].iloc[first]]


def test_the_files_hold_what_the_artifact_holds(labelled: Ran) -> None:
    verdicts = labelled.load("detect", "verdicts")
    stored = pd.read_parquet(labelled.folder / "verdicts.parquet")
    pd.testing.assert_frame_equal(stored, verdicts, check_dtype=False, check_categorical=False)
    lines = [orjson.loads(line) for line in (labelled.folder / "verdicts.ndjson").read_bytes().splitlines()]
    assert [(line["file"], line["row"]) for line in lines] == list(zip(verdicts["file"], verdicts["row"], strict=True))
    assert [line["anomaly_score"] for line in lines] == verdicts["anomaly_score"].tolist()
    findings = [orjson.loads(line) for line in (labelled.folder / "findings.ndjson").read_bytes().splitlines()]
    malicious = verdicts[verdicts["label"] == "malicious"]
    assert [found["evidences"][0]["connection_info"]["uid"] for found in findings] == malicious["flow_id"].tolist()
    (artifact,) = labelled.run.steps["detect"].outputs["verdicts_page"]
    assert VisualizationType.HTML in [shown.type for shown in artifact.visualizations or []]
    assert (labelled.folder / "verdicts.html").read_text() == artifact.load()


def test_the_run_says_which_detector_judged(labelled: Ran, detector: Detector, versions: tuple[str, str]) -> None:
    (given,) = labelled.run.steps["detect"].inputs["detector"]
    stored = Client().get_model_version("flowsentry", versions[0]).get_artifact("detector")
    assert stored is not None
    assert given.id == stored.id
    assert labelled.load("detect", "verdict_summary").detector == detector.digest


def test_unlabelled_files_need_no_truth_and_bad_rows_are_listed(unlabelled: Ran, raw: pd.DataFrame) -> None:
    assert unlabelled.status == 0, unlabelled.err
    assert unlabelled.files == FILES | {"quarantine.csv"}
    kept = pd.read_csv(unlabelled.folder / "quarantine.csv")
    assert sorted(kept["row"]) == [11, 21]
    verdicts, summary = unlabelled.load("detect", "verdicts"), unlabelled.load("detect", "verdict_summary")
    assert sorted(verdicts["row"]) == sorted(set(range(1, len(raw) + 1)) - {11, 21})
    assert summary.labelled == 0
    assert summary.scores == {}
    assert summary.alerts > 0
    assert "2 rows are quarantined and have no verdict" in unlabelled.out
    assert "no labels" in unlabelled.out
    page = (unlabelled.folder / "verdicts.html").read_text()
    assert "src_ip is not an IPv4 or IPv6 address" in page
    assert "How right it is" not in page


def test_labels_change_no_verdict(unlabelled: Ran, detector: Detector) -> None:
    with_labels = detector.verdicts(recording(6).drop([10, 20]).reset_index(drop=True))
    without = unlabelled.load("detect", "verdicts")
    assert without["anomaly_score"].tolist() == with_labels["anomaly_score"].tolist()
    assert without["flow"].tolist() == with_labels["flow"].tolist()


def test_the_cache_answers_for_the_same_champion_only(
    labelled: Ran, versions: tuple[str, str], detector: Detector, other: Detector
) -> None:
    again = start("inference")
    assert again.states == dict.fromkeys(["load", "validate", "detect"], ExecutionStatus.CACHED)
    assert again.files == FILES
    client = Client()
    client.get_model_version("flowsentry", versions[1]).set_stage("production", force=True)
    try:
        promoted = start("inference")
    finally:
        client.get_model_version("flowsentry", versions[0]).set_stage("production", force=True)
    assert promoted.states == {
        "load": ExecutionStatus.CACHED,
        "validate": ExecutionStatus.CACHED,
        "detect": ExecutionStatus.COMPLETED,
    }
    assert promoted.load("detect", "verdict_summary").detector == other.digest != detector.digest
    named = start("inference", "--model-version", versions[1])
    assert named.states["detect"] == ExecutionStatus.CACHED
    assert f"by model version {versions[1]} (tails" in named.out


def test_the_deployed_champion_judges_by_its_digest_not_the_version_at_stage_production(
    labelled: Ran, versions: tuple[str, str], folder: Path
) -> None:
    assert f"model version {versions[0]} judges: at stage production, as nothing is deployed" in labelled.out
    record = folder / "home" / "record.json"
    record.parent.mkdir()
    try:
        record.write_text(deployed(versions[1], "a" * 64).model_dump_json())
        ran = start("inference")
        record.write_text(deployed(versions[1], "b" * 64).model_dump_json())
        status, out, err = refused("inference")
    finally:
        record.unlink()
    assert ran.status == 0
    assert f"model version {versions[1]} judges: the champion" in ran.out
    assert f"by model version {versions[1]} (tails" in ran.out
    assert (status, out) == (2, "")
    assert "this ZenML store does not know its bundle bbbbbbbbbbbb: use the ZenML store that it was trained in" in err


def test_an_unknown_version_is_refused_with_those_that_are_known(versions: tuple[str, str]) -> None:
    status, out, err = refused("inference", "--model-version", "999")
    assert (status, out) == (2, "")
    assert err == (
        "error: model version 999 is unknown; run python run.py --pipeline train, "
        f"or name one of {versions[1]}, {versions[0]} with --model-version\n"
    )


def test_too_many_bad_rows_end_the_run_and_are_kept(versions: tuple[str, str], folder: Path, raw: pd.DataFrame) -> None:
    raw.assign(_source_source_ip=raw["_source_source_ip"].mask(raw.index % 5 == 0, "nowhere")).to_csv(
        folder / "bad.csv", index=False
    )
    ran = start("inference", "--data", "bad.csv")
    assert ran.status == 1
    assert ran.err.startswith("error: ")
    assert "rows are bad" in ran.err
    assert ran.files == {"validation.html", "quarantine.csv"}
