from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowsentry.config import InferenceConfig
from flowsentry.errors import StackError
from pipelines.submit import submit


class NothingBegins:
    """A pipeline of which ZenML starts no run."""

    name = "train"

    def with_options(self, **_: Any) -> NothingBegins:
        return self

    def prepare(self, **_: Any) -> None:
        """Nothing."""

    def __call__(self, **_: Any) -> None:
        """No run."""


class Elsewhere:
    def __init__(self, *, scheduled: bool) -> None:
        self.scheduled = scheduled

    def adapt(self, pipeline: Any) -> Any:
        return pipeline

    def follow(self, run: Any) -> None:
        raise AssertionError(f"there is nothing to follow, not even {run}")


def begun(tmp_path: Path, *, scheduled: bool) -> Any:
    config = InferenceConfig(reports=str(tmp_path))
    pipeline: Any = NothingBegins()
    return submit(pipeline, config, {}, cache=True, place=Elsewhere(scheduled=scheduled))


def test_a_run_that_did_not_begin_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="began no run"):
        begun(tmp_path, scheduled=False)


def test_what_was_put_on_a_schedule_has_no_run_yet(tmp_path: Path) -> None:
    assert begun(tmp_path, scheduled=True) is None
