from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from flowsentry.errors import StoreError
from flowsentry.features.views import FeatureSet

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small


@pytest.mark.parametrize("view", ["behaviour", "paper"])
def test_a_stored_view_is_the_same_again(small: Small, tmp_path: Path, view: str) -> None:
    features = small.views[view]
    features.save(tmp_path / "it")
    loaded = FeatureSet.load(tmp_path / "it")
    assert loaded.manifest == features.manifest
    pd.testing.assert_frame_equal(loaded.rows, features.rows, check_dtype=view == "behaviour", check_categorical=False)
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == ["manifest.json", "values.parquet"]


@pytest.mark.parametrize("file", ["manifest.json", "values.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_view_is_one_line(small: Small, tmp_path: Path, file: str, content: bytes | None) -> None:
    small.views["paper"].save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        FeatureSet.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_values_of_another_view_are_refused(small: Small, tmp_path: Path) -> None:
    small.views["paper"].save(tmp_path / "paper")
    small.views["behaviour"].save(tmp_path / "behaviour")
    (tmp_path / "paper" / "values.parquet").replace(tmp_path / "behaviour" / "values.parquet")
    with pytest.raises(StoreError, match="do not belong together"):
        FeatureSet.load(tmp_path / "behaviour")


def test_a_manifest_with_a_key_that_nobody_knows_is_refused(small: Small, tmp_path: Path) -> None:
    small.views["behaviour"].save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"owner": "me"}))
    with pytest.raises(StoreError):
        FeatureSet.load(tmp_path)
