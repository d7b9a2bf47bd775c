"""Whole runs of the pipeline replay, as run.py starts them, against a service that the deployer started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from zenml.enums import ExecutionStatus

from flowsentry.detector import Detector
from flowsentry.serving import bundle
from flowsentry.serving.local import LocalDeployer
from flowsentry.simulation.files import write
from stacks import apply
from tests.pipelines.champion import Ran, recording, refused, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


@pytest.fixture(scope="module")
def folder(isolated_zenml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        patch.setenv("FLOWSENTRY_HOME", str(folder / "home"))
        patch.setenv("FLOWSENTRY_PORT", "0")
        apply.activate("local")
        (folder / "config.yaml").write_text("simulation: {seed: 5, minutes: 60, scale: 0.1, episodes: 1}\n")
        yield folder


@pytest.fixture(scope="module")
def undeployed(folder: Path) -> tuple[int, str, str]:
    """A run before anything is in production."""
    return refused("replay")


@pytest.fixture(scope="module")
def champion(undeployed: object, folder: Path, detector: Detector) -> Iterator[LocalDeployer]:
    built = bundle.build(detector, "7", folder / "bundle")
    deployer = LocalDeployer()
    try:
        deployer.start_challenger(built.path, "7", built.digest)
        deployer.promote(built.digest, None)
        yield deployer
    finally:
        deployer.stop()


@pytest.fixture(scope="module")
def replayed(champion: LocalDeployer) -> Ran:
    return start("replay")


def test_without_a_champion_the_error_says_what_to_run(undeployed: tuple[int, str, str]) -> None:
    status, out, err = undeployed
    assert (status, out) == (1, "")
    assert err == "error: no model has been deployed yet: python run.py --pipeline train\n"


def test_every_report_gets_the_verdict_that_it_gets_offline(replayed: Ran, detector: Detector) -> None:
    assert replayed.status == 0, replayed.err
    assert set(replayed.states) == {"load", "validate", "replay"}
    assert replayed.files == {"validation.html", "replay.html", "replay.json", "replay.parquet"}
    reports, answers = replayed.load("validate", "valid_reports"), replayed.load("replay", "answers")
    expected = detector.verdicts(reports)
    assert answers["verdict"].tolist() == expected["label"].tolist()
    assert answers["anomaly_score"].tolist() == expected["anomaly_score"].tolist()
    assert answers["expected"].tolist() == reports["corrected"].tolist()
    assert (answers["latency_ms"] > 0).all()
    stored = pd.read_parquet(replayed.folder / "replay.parquet")
    assert stored["verdict"].tolist() == answers["verdict"].tolist()


def test_its_scores_are_told_with_the_version_that_answered(
    replayed: Ran, champion: LocalDeployer, folder: Path
) -> None:
    report, answers = replayed.load("replay", "replay_report"), replayed.load("replay", "answers")
    last = answers.groupby("flow").last()
    wrong = int((last["verdict"] != last["expected"]).sum())
    service, _, benign, _ = report.answers
    assert service.counts.fp + service.counts.fn == wrong
    assert benign.counts.fn == int((last["expected"] == "malicious").sum())
    assert f"to {champion.endpoint().url}, model version 7" in replayed.out
    assert f"{wrong:,} wrong; always saying benign would have {benign.counts.fn:,} wrong" in replayed.out
    assert Path(report.journal).is_relative_to(folder / "home" / "replays")


def test_flows_may_come_from_the_cache_but_never_the_answers(replayed: Ran) -> None:
    again = start("replay")
    assert again.states == {
        "load": ExecutionStatus.CACHED,
        "validate": ExecutionStatus.CACHED,
        "replay": ExecutionStatus.COMPLETED,
    }
    assert again.load("replay", "replay_report").journal != replayed.load("replay", "replay_report").journal


def test_flows_without_labels_are_refused_in_one_line(champion: LocalDeployer, folder: Path) -> None:
    write(recording(6, minutes=40, scale=0.02), folder / "flows.csv.gz")
    pd.read_csv(folder / "flows.csv.gz", dtype=str).drop(columns="label").to_csv(folder / "flows.csv", index=False)
    ran = start("replay", "--data", "flows.csv")
    assert ran.status == 1
    assert ran.err.startswith("error: flows.csv: no flow is labelled")
