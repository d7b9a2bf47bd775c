from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import mlflow
import numpy as np
import pytest

from flowsentry.learning.families import FAMILIES, fit
from flowsentry.learning.model import Model
from flowsentry.learning.search import SearchResult, search, stratified_group_folds
from flowsentry.learning.tracking import draw_confusion, log_candidate

TAGS = {"data_digest": "d" * 64, "view_digest": "v" * 64}
CONFUSION = {"random": np.array([[90, 10], [0, 7]])}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    identity = mlflow.create_experiment("sweep", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=identity)
    yield identity
    mlflow.set_tracking_uri(before)


@pytest.fixture
def candidate(tmp_path: Path) -> tuple[SearchResult, Path]:
    random = np.random.default_rng(0)
    X = random.normal(size=(200, 2))
    y = X[:, 0] > 0
    folds = stratified_group_folds(y, np.arange(200), 3, 0)
    family = FAMILIES["knn"]
    result = search(family, X, y, harm=[0, 0], folds=folds, metric="accuracy", seed=0, target_fpr=0.005)
    fit(family, result.best, X, y, [0, 0], 0).save(tmp_path / "stored")
    return result, tmp_path / "stored"


def test_a_candidate_its_trials_and_its_model_are_in_mlflow(
    experiment: str, candidate: tuple[SearchResult, Path], tmp_path: Path
) -> None:
    result, folder = candidate
    identity = log_candidate(
        FAMILIES["knn"],
        result.best,
        result=result,
        metrics={"family/recall/corrected": 0.9},
        confusion=CONFUSION,
        tags=TAGS,
        model_folder=folder,
    )
    client = mlflow.MlflowClient()
    run = client.get_run(identity)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"family/recall/corrected": 0.9, "search/accuracy": result.score}
    assert run.data.params == {name: str(value) for name, value in result.best.items()}
    assert TAGS.items() <= run.data.tags.items()
    files = Path(mlflow.artifacts.download_artifacts(run_id=identity, dst_path=str(tmp_path / "back")))
    assert Model.load(files / "model").params == result.best
    assert {path.suffix for path in files.rglob("*") if path.is_file()} == {".png", ".json", ".npz"}
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{identity}'")
    logged = {frozenset(trial.data.params.items()): trial.data.metrics["accuracy"] for trial in trials}
    assert logged == {
        frozenset((name, str(value)) for name, value in trial.params.items()): trial.score for trial in result.trials
    }


def test_within_an_active_run_a_candidate_is_nested_and_leaves_it_active(
    experiment: str, candidate: tuple[SearchResult, Path]
) -> None:
    _, folder = candidate
    with mlflow.start_run() as outer:
        identity = log_candidate(
            FAMILIES["tails"],
            {"combine": "sum"},
            result=None,
            metrics={},
            confusion={},
            tags=TAGS,
            model_folder=folder,
        )
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == outer.info.run_id
    tags = mlflow.MlflowClient().get_run(identity).data.tags
    assert tags["mlflow.parentRunId"] == outer.info.run_id


def test_a_confusion_picture_has_a_panel_for_each_protocol(tmp_path: Path) -> None:
    draw_confusion("Nearest neighbours", CONFUSION, tmp_path / "one.png")
    draw_confusion("Nearest neighbours", {**CONFUSION, "time": CONFUSION["random"]}, tmp_path / "two.png")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[1] > 1.5 * one.shape[1]
    assert one[..., :3].std() > 0.1
