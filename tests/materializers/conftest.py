from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zenml.materializers.base_materializer import BaseMaterializer

RoundTrip = Callable[[type[BaseMaterializer], Any], tuple[Any, Path]]


@pytest.fixture
def round_trip(isolated_zenml: Path, tmp_path: Path) -> RoundTrip:
    """Save and load by a materializer; gives the loaded value and the folder of the artifact."""
    from zenml.client import Client

    store = Client().active_stack.artifact_store
    folder = Path(store.path) / "round-trip" / tmp_path.name

    def save_and_load(kind: type[BaseMaterializer], value: Any) -> tuple[Any, Path]:
        folder.mkdir(parents=True)
        kind(uri=str(folder), artifact_store=store).save(value)
        kind(uri=str(folder), artifact_store=store).save_visualizations(value)
        return kind(uri=str(folder), artifact_store=store).load(type(value)), folder

    return save_and_load
