from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from zenml.client import Client
from zenml.enums import StackComponentType

from stacks import apply
from steps import tracking


@pytest.fixture
def elsewhere(isolated_zenml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, and what MLflow was pointed to before."""
    before = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZENML_ACTIVE_STACK_ID", "")
    yield tmp_path
    mlflow.set_tracking_uri(before)


def test_a_stack_without_a_tracker_is_no_error(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = Client().get_stack("default")
    assert StackComponentType.EXPERIMENT_TRACKER not in default.components
    monkeypatch.setenv("ZENML_ACTIVE_STACK_ID", str(default.id))
    assert tracking.connect() is False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_of_runs_go_to_the_artifact_store_wherever_one_works(elsewhere: Path) -> None:
    apply.activate("local")
    assert tracking.connect() is True
    assert tracking.connect() is True, "the second time the experiment is there"
    with mlflow.start_run():
        (elsewhere / "it.txt").write_text("content")
        mlflow.log_artifact(str(elsewhere / "it.txt"))
        place = mlflow.get_artifact_uri("it.txt")
    store = Path(Client().active_stack.artifact_store.path)
    assert Path(place.removeprefix("file://")).is_relative_to(store / "mlflow_artifacts")
    assert [path.name for path in elsewhere.iterdir()] == ["it.txt"]
