from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from flowsentry.errors import StoreError
from flowsentry.serving import bundle as bundles
from flowsentry.serving.bundle import Bundle
from materializers import BundleMaterializer
from tests.materializers.conftest import RoundTrip


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Files with the sums of a bundle."""
    source = tmp_path / "bundle" / "src"
    source.mkdir(parents=True)
    (source / "bundle.json").write_text(json.dumps({"model_version": "7", "view": "behaviour"}))
    (source / "code.py").write_text("x = 1\n")
    text = bundles._sums(source.parent)
    (source.parent / bundles.SUMS).write_text(text)
    return Bundle(source.parent, hashlib.sha256(text.encode()).hexdigest())


def test_a_bundle_is_the_same_again(round_trip: RoundTrip, bundle: Bundle) -> None:
    loaded, folder = round_trip(BundleMaterializer, bundle)
    assert type(loaded) is Bundle
    assert (loaded.digest, loaded.about) == (bundle.digest, bundle.about)
    assert loaded.path != bundle.path
    assert (loaded.path / "src" / "code.py").read_text() == "x = 1\n"
    assert sorted(path.name for path in folder.iterdir()) == ["bundle.tar.gz", "digest.txt"]


def test_another_bundle_in_its_place_is_refused(
    round_trip: RoundTrip, bundle: Bundle, isolated_zenml: Path, tmp_path: Path
) -> None:
    from zenml.client import Client

    _, folder = round_trip(BundleMaterializer, bundle)
    (bundle.path / "src" / "code.py").write_text("x = 2\n")
    text = bundles._sums(bundle.path)
    (bundle.path / bundles.SUMS).write_text(text)
    bundles.pack(Bundle(bundle.path, hashlib.sha256(text.encode()).hexdigest()), folder / "bundle.tar.gz")
    with pytest.raises(StoreError, match="digest"):
        BundleMaterializer(uri=str(folder), artifact_store=Client().active_stack.artifact_store).load(Bundle)


def test_the_dashboard_is_told_the_digest_and_the_model_version(isolated_zenml: Path, bundle: Bundle) -> None:
    from zenml.client import Client

    kind = BundleMaterializer(uri=str(bundle.path), artifact_store=Client().active_stack.artifact_store)
    assert kind.extract_metadata(bundle) == {"digest": bundle.digest, "model_version": "7", "view": "behaviour"}
