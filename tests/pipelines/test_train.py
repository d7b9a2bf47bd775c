"""Whole runs of the pipeline train, as run.py starts them, in a ZenML of their own."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from zenml.client import Client
from zenml.enums import ExecutionStatus, StackComponentType, VisualizationType
from zenml.models import PipelineRunResponse

import run as program
from flowsentry.detector import Detector
from flowsentry.features.splits import Splits
from flowsentry.features.views import FeatureSet
from flowsentry.flows.schema import SCHEMA, conform, is_malicious
from flowsentry.learning.candidates import Candidate
from flowsentry.learning.selection import Selection
from flowsentry.reporting.metrics import count
from flowsentry.reporting.results import Evaluation
from flowsentry.simulation import SimulationSettings, simulate
from flowsentry.simulation.files import write
from steps import code_digest

FAMILIES = ("decision_tree", "tails")
STEPS = {
    "load",
    "validate",
    "engineer",
    "check_protocol",
    *(f"train_sweep_{family}" for family in FAMILIES),
    "evaluate",
    "select",
    "register",
}
PAGES = {
    "validation.html",
    "view.html",
    "evaluation.html",
    "evaluation.json",
    "evaluation.md",
    "model_card.html",
}
SMALL = """\
deploy: false
simulation: {minutes: 60, scale: 0.1, episodes: 1}
families: [decision_tree, tails]
splits: {rotations: 1}
search: {folds: 2}
"""
EASY = "select: {protocol: random, metric: accuracy}\n"
"""Something is good enough."""
HARD = "select: {protocol: time, metric: recall, max_fpr: 1.0e-9}\n"
"""Nothing is: of the attacks after the cut no candidate finds one."""

pytestmark = [
    pytest.mark.slow,
    # ZenML and MLflow warn of themselves and of one another; what our own code does wrong still counts
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str
    run: PipelineRunResponse
    reports: Path

    @property
    def pages(self) -> set[str]:
        folder = self.reports / self.run.name
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    def load(self, step: str, output: str) -> Any:
        (artifact,) = self.run.steps[step].outputs[output]
        return artifact.load()

    @property
    def states(self) -> dict[str, ExecutionStatus]:
        return {name: step.status for name, step in self.run.steps.items()}

    @property
    def error(self) -> str:
        """The one line on stderr."""
        (line,) = [line for line in self.err.splitlines() if line.strip()]
        return line


@pytest.fixture(scope="module")
def folder(isolated_zenml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        yield folder


def start(folder: Path, config: str, *arguments: str) -> Ran:
    (folder / "config.yaml").write_text(config)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program.main(["--pipeline", "train", "--config", "config.yaml", *arguments])
    (last,) = Client().list_pipeline_runs(sort_by="desc:created", size=1).items
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return Ran(status, out.getvalue(), err.getvalue(), Client().get_pipeline_run(last.id), folder / "reports")


@pytest.fixture(scope="module")
def first(folder: Path) -> Ran:
    return start(folder, SMALL + EASY, "--no-cache")  # other modules run the same in this ZenML


def test_a_run_goes_through_all_steps_and_says_what_it_selected(first: Ran) -> None:
    assert first.status == 0, first.err
    assert first.err == ""
    assert first.run.status == ExecutionStatus.COMPLETED
    assert first.states == dict.fromkeys(STEPS, ExecutionStatus.COMPLETED)
    assert "Selected: Decision tree has the best accuracy under the protocol random" in first.out
    assert "Model:    flowsentry, version 1, stage staging" in first.out
    assert first.run.name in first.out


def test_every_family_is_a_step_of_its_own_that_waits_for_no_other(first: Ran) -> None:
    for family in FAMILIES:
        upstream = first.run.steps[f"train_sweep_{family}"].spec.upstream_steps
        assert set(upstream) == {"engineer", "check_protocol"}
    assert {f"train_sweep_{family}" for family in FAMILIES} <= set(first.run.steps["evaluate"].spec.upstream_steps)


def test_its_pages_are_on_disk_and_named(first: Ran) -> None:
    assert first.pages == PAGES
    for page in PAGES:
        assert f"Page:     reports/{first.run.name}/{page}" in first.out
        text = (first.reports / first.run.name / page).read_text()
        assert text.lower().startswith("<!doctype html>") or not page.endswith(".html")
    stored = Evaluation.model_validate_json((first.reports / first.run.name / "evaluation.json").read_text())
    assert stored == first.load("evaluate", "evaluation")


def test_rows_are_accounted_for(first: Ran) -> None:
    said = re.search(
        r"^([\d,]+) rows read = ([\d,]+) flows \+ ([\d,]+) merged reports \+ ([\d,]+) quarantined$", first.out, re.M
    )
    assert said
    read, *parts = (int(number.replace(",", "")) for number in said.groups())
    assert read == sum(parts) == len(first.load("load", "reports"))
    assert parts[0] == len(first.load("engineer", "flows"))
    logged = first.run.steps["validate"].run_metadata["rows"]
    assert logged == dict(zip(("read", "flows", "merged_reports", "quarantined"), (read, *parts), strict=True))
    assert logged == first.load("validate", "rows")
    expectations = first.run.steps["validate"].run_metadata["expectations"]
    assert expectations["checked"] == expectations["passed"] > 10


def test_every_artifact_comes_back_as_what_it_was(first: Ran) -> None:
    reports = first.load("load", "reports")
    pd.testing.assert_frame_equal(reports, conform(reports))
    again = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    pd.testing.assert_frame_equal(reports, again, check_categorical=False)
    expected = {
        ("engineer", "features"): FeatureSet,
        ("engineer", "splits"): Splits,
        ("train_sweep_tails", "candidate"): Candidate,
        ("evaluate", "evaluation"): Evaluation,
        ("select", "selection"): Selection,
        ("select", "detector"): Detector,
        ("validate", "quarantine"): pd.DataFrame,
        ("register", "model_version"): str,
    }
    for (step, output), kind in expected.items():
        assert type(first.load(step, output)) is kind
    known = {column.name for column in SCHEMA}
    assert set(first.load("engineer", "flows")) - known == {"reports", "first_time", "place"}


def test_the_dashboard_has_a_page_for_checks_view_scores_and_model(first: Ran) -> None:
    for step, output in (
        ("validate", "validation_page"),
        ("engineer", "view_page"),
        ("evaluate", "report"),
        ("select", "model_card"),
    ):
        (artifact,) = first.run.steps[step].outputs[output]
        kinds = [shown.type for shown in artifact.visualizations or []]
        assert VisualizationType.HTML in kinds
        assert "<html" in artifact.load()


def test_what_ships_judges_the_validation_flows_as_its_card_says(first: Ran) -> None:
    detector, flows = first.load("select", "detector"), first.load("engineer", "flows")
    validation = first.load("engineer", "splits").rows("random", "validation")
    final = detector.verdicts(first.load("load", "reports")).groupby("flow").last().loc[validation]
    counts = count(is_malicious(flows.loc[validation, "corrected"]), is_malicious(final["label"]))
    assert counts.model_dump() == detector.card["validation"]["corrected"]["counts"]
    assert detector.card["selection"]["reason"] == first.load("select", "selection").reason


def test_the_detector_is_a_model_version_at_staging_with_the_decision(first: Ran) -> None:
    version = Client().get_model_version("flowsentry", first.load("register", "model_version"))
    assert version.stage == "staging"
    told = version.run_metadata
    selection = first.load("select", "selection")
    assert told["decision"] == selection.chosen == "decision_tree"
    assert told["reason"] == selection.reason
    assert set(told["scores"]) == {ranked.name for ranked in selection.ranking}
    assert told["scores"]["decision_tree"]["value"] == pytest.approx(selection.ranking[0].value)
    (linked,) = first.run.steps["select"].outputs["detector"]
    assert linked.id in {link.id for link in version.data_artifacts.values() for link in link.values()} | {
        artifact.id for versions in version.model_artifacts.values() for artifact in versions.values()
    }


def test_mlflow_has_a_run_for_each_family_with_its_trials_nested(first: Ran) -> None:
    from mlflow import MlflowClient
    from zenml.integrations.mlflow.experiment_trackers import MLFlowExperimentTracker

    tracker = Client().active_stack.experiment_tracker
    assert isinstance(tracker, MLFlowExperimentTracker)
    mlflow = MlflowClient(tracker.get_tracking_uri())
    experiment = mlflow.get_experiment_by_name("flowsentry")
    assert experiment is not None
    runs = mlflow.search_runs([experiment.experiment_id], f"tags.zenml_run = '{first.run.name}'")
    assert {run.info.run_name for run in runs} == set(FAMILIES)
    manifest = first.load("engineer", "features").manifest
    for run in runs:
        candidate = first.load(f"train_sweep_{run.info.run_name}", "candidate")
        assert run.data.params == {key: str(value) for key, value in candidate.search.best.items()}
        assert run.data.tags["view_digest"] == manifest.digest
        assert "data_digest" in run.data.tags
        for protocol in ("random", "time", "family"):
            for labels in ("published", "corrected"):
                assert f"{protocol}/recall/{labels}" in run.data.metrics
        files = {file.path for file in mlflow.list_artifacts(run.info.run_id)}
        assert files == {"confusion.png", "model"}
        picture = Path(mlflow.download_artifacts(run.info.run_id, "confusion.png"))
        assert picture.read_bytes().startswith(b"\x89PNG")
        trials = mlflow.search_runs(
            [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", max_results=500
        )
        assert len(trials) == len(candidate.search.trials) > 1
        assert all(trial.info.status == "FINISHED" and trial.data.params for trial in trials)


def test_nothing_is_pickled(first: Ran) -> None:
    store = Path(Client().active_stack.artifact_store.path)
    files = [path for path in store.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert any("mlflow_artifacts" in path.parts for path in files)
    for path in files:
        assert path.suffix not in {".pkl", ".pickle", ".joblib", ".cloudpickle"}, path
        with path.open("rb") as file:
            assert file.read(2) not in {b"\x80\x03", b"\x80\x04", b"\x80\x05"}, path
        if zipfile.is_zipfile(path):
            names = zipfile.ZipFile(path).namelist()
            assert not [name for name in names if name.endswith((".pkl", ".pickle"))]
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    assert all(array.dtype != object for array in arrays.values())


def test_a_run_leaves_its_reports_in_the_working_folder_and_nothing_else(folder: Path, first: Ran) -> None:
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "reports"}


def test_the_same_again_is_taken_from_the_cache_and_registers_nothing(folder: Path, first: Ran) -> None:
    versions = Client().list_model_versions(model="flowsentry").total
    again = start(folder, SMALL + EASY)
    assert again.status == 0, again.err
    assert again.states == dict.fromkeys(STEPS, ExecutionStatus.CACHED)
    assert again.pages == PAGES
    assert Client().list_model_versions(model="flowsentry").total == versions
    assert "version 1, stage staging" in again.out


def test_if_nothing_is_good_enough_the_run_says_so_and_still_leaves_its_report(folder: Path, first: Ran) -> None:
    versions = Client().list_model_versions(model="flowsentry").total
    ran = start(folder, SMALL + HARD)
    assert ran.status == 1
    assert ran.error.startswith("error: nothing selected: ")
    assert ran.run.status == ExecutionStatus.FAILED
    assert ran.states["evaluate"] == ExecutionStatus.CACHED
    assert ran.pages == PAGES - {"model_card.html"}
    assert "All protocols side by side" in ran.out
    assert "Selected" not in ran.out
    assert ran.run.steps["select"].run_metadata["decision"] == "nothing"
    assert Client().list_model_versions(model="flowsentry").total == versions


def test_other_code_runs_everything_again_and_its_model_takes_the_stage(
    folder: Path, first: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flowsentry", "materializers", "steps"):
        shutil.copytree(code_digest.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "flowsentry" / "errors.py").open("a") as file:
        file.write("# another line\n")
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)
    code_digest.code_digest.cache_clear()
    try:
        ran = start(folder, SMALL + EASY)
    finally:
        code_digest.code_digest.cache_clear()
    assert ran.status == 0, ran.err
    assert ran.states == dict.fromkeys(STEPS, ExecutionStatus.COMPLETED)
    assert ran.load("register", "model_version") == "2"
    stages = {v.name: v.stage for v in Client().list_model_versions(model="flowsentry").items}
    assert stages == {"1": "archived", "2": "staging"}
    before, after = first.load("evaluate", "evaluation"), ran.load("evaluate", "evaluation")
    assert after.entries == before.entries


def test_files_of_the_published_layout_run_with_the_view_of_the_study(folder: Path) -> None:
    write(simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1)), folder / "mine.csv.gz")
    config = "deploy: false\nview: paper\nlabels: published\nfamilies: [decision_tree]\nsplits: {rotations: 1}\n"
    ran = start(folder, config + "search: {folds: 2, metric: accuracy}\n" + EASY, "--data", "mine.csv.gz")
    assert ran.status == 0, ran.err
    detector = ran.load("select", "detector")
    assert detector.manifest.name == "paper"
    assert detector.card["view"]["uses_identity"] is True
    assert detector.card["limits"][0].startswith("The view holds identities")
    files = ran.load("load", "files")
    assert list(files) == ["mine.csv.gz"]
    assert ran.load("engineer", "features").manifest.lineage["file mine.csv.gz"] == files["mine.csv.gz"]


def published(folder: Path) -> pd.DataFrame:
    write(simulate(SimulationSettings(minutes=40, scale=0.05, episodes=1)), folder / "it.csv.gz")
    return pd.read_csv(folder / "it.csv.gz", dtype=str)


def test_flows_without_both_labels_are_one_clear_line(folder: Path) -> None:
    table = published(folder)
    for label in (None, "benign"):
        labelled = table.drop(columns="label") if label is None else table.assign(label=label)
        labelled.to_csv(folder / "one-class.csv", index=False)
        ran = start(folder, SMALL, "--data", "one-class.csv")
        assert ran.status == 1
        assert ran.error.startswith("error: training needs benign and malicious flows, but of ")
        assert "give flows with both labels" in ran.error
        assert ran.pages == {"validation.html", "view.html"}


def test_a_protocol_that_the_flows_do_not_allow_ends_the_run_before_training(folder: Path) -> None:
    published(folder)
    ran = start(folder, SMALL, "--data", "it.csv.gz")
    assert ran.status == 1
    assert ran.error.startswith("error: protocol family cannot be carried out on these flows: needs two groups")
    assert "; set select.protocol to random" in ran.error
    assert ran.states["engineer"] == ExecutionStatus.COMPLETED
    assert not [name for name in ran.states if name.startswith("train_sweep")]
    assert ran.pages == {"validation.html", "view.html"}


def test_too_many_bad_rows_fail_the_run_and_are_kept(folder: Path) -> None:
    """The file of the same name was read before: other content is another run."""
    table = published(folder)
    table.loc[::5, "_source_source_ip"] = "nowhere"
    table.to_csv(folder / "one-class.csv", index=False)
    ran = start(folder, SMALL, "--data", "one-class.csv")
    assert ran.status == 1
    assert re.match(r"error: \d+ of [\d,]+ rows are bad \(20\.\d+%, limit 5\.00%\): src_ip is not", ran.error)
    assert ran.states["validate"] == ExecutionStatus.FAILED
    assert ran.pages == {"validation.html", "quarantine.csv"}
    kept = pd.read_csv(ran.reports / ran.run.name / "quarantine.csv")
    assert list(kept) == ["file", "row", "reason", "raw"]
    assert kept["row"].tolist() == list(range(1, len(table) + 1, 5))
    pd.testing.assert_frame_equal(ran.load("validate", "quarantine"), kept, check_dtype=False)
    assert f"reports/{ran.run.name}/quarantine.csv" in ran.out


def test_a_few_bad_rows_are_kept_and_the_run_goes_on(folder: Path) -> None:
    table = published(folder)
    table.loc[3, "_source_source_ip"] = "nowhere"
    table["label"] = "benign"
    table.to_csv(folder / "few.csv", index=False)
    ran = start(folder, SMALL, "--data", "few.csv")
    assert ran.states["engineer"] == ExecutionStatus.COMPLETED
    assert ran.pages == {"validation.html", "view.html", "quarantine.csv"}
    assert ran.load("validate", "quarantine")["row"].tolist() == [4]
    told = ran.run.steps["validate"].run_metadata
    assert told["expectations"]["passed"] == told["expectations"]["checked"] - 1
    assert list(told["bad_rows_by_reason"].values()) == [1]
    assert "+ 1 quarantined" in ran.out


def test_the_users_own_active_stack_stays(first: Ran, fresh_zenml: Path) -> None:
    assert Client().active_stack_model.name == "default"
    assert StackComponentType.EXPERIMENT_TRACKER in Client().get_stack("flowsentry-local").components
