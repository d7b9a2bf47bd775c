from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from zenml.materializers.base_materializer import BaseMaterializer

from flowsentry.detector import Detector
from flowsentry.features.build import build
from flowsentry.features.splits import Splits, make_splits
from flowsentry.features.views import FeatureSet
from flowsentry.flows import labels
from flowsentry.flows.reports import collapse, identify
from flowsentry.learning.candidates import Candidate, Recipe, train
from flowsentry.learning.families import FAMILIES
from flowsentry.simulation import SimulationSettings, simulate
from materializers import (
    CandidateMaterializer,
    DetectorMaterializer,
    FeatureSetMaterializer,
    SplitsMaterializer,
)
from tests.materializers.conftest import RoundTrip


@pytest.fixture(scope="module")
def made() -> tuple[FeatureSet, Splits, Candidate]:
    raw = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    flows = collapse(reports)
    features = build("behaviour", reports, flows, {"file a": "b"})
    splits = make_splits(flows, warm_up_seconds=features.manifest.warm_up_seconds, rotations=1)
    recipe = Recipe(labels="corrected", metric="accuracy", inner_folds=2, target_fpr=0.001, needs_effect=True, seed=0)
    return features, splits, train(FAMILIES["tails"], features, flows, splits, recipe)


def test_a_view_is_the_same_again(round_trip: RoundTrip, made: tuple[FeatureSet, Splits, Candidate]) -> None:
    features = made[0]
    loaded, _ = round_trip(FeatureSetMaterializer, features)
    assert type(loaded) is FeatureSet
    assert loaded.manifest == features.manifest
    pd.testing.assert_frame_equal(loaded.rows, features.rows, check_exact=True)


def test_splits_are_the_same_again(round_trip: RoundTrip, made: tuple[FeatureSet, Splits, Candidate]) -> None:
    splits = made[1]
    loaded, _ = round_trip(SplitsMaterializer, splits)
    assert type(loaded) is Splits
    assert (loaded.folds, loaded.impossible) == (splits.folds, splits.impossible)
    pd.testing.assert_frame_equal(loaded.parts, splits.parts)


def test_a_candidate_is_the_same_again(round_trip: RoundTrip, made: tuple[FeatureSet, Splits, Candidate]) -> None:
    candidate = made[2]
    loaded, _ = round_trip(CandidateMaterializer, candidate)
    assert type(loaded) is Candidate
    assert loaded.search == candidate.search
    pd.testing.assert_frame_equal(loaded.scores, candidate.scores, check_exact=True)


def test_a_detector_is_the_same_again(round_trip: RoundTrip, made: tuple[FeatureSet, Splits, Candidate]) -> None:
    features, _, candidate = made
    detector = candidate.detector.with_card({"é": [1, None]})
    loaded, folder = round_trip(DetectorMaterializer, detector)
    assert type(loaded) is Detector
    assert loaded.card == detector.card
    assert loaded.score(features.rows).tobytes() == detector.score(features.rows).tobytes()
    stored = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert stored <= {".json", ".npz", ".skops"}


@pytest.mark.parametrize(
    ("kind", "place", "key"),
    [
        (FeatureSetMaterializer, 0, "digest"),
        (SplitsMaterializer, 1, "folds"),
        (CandidateMaterializer, 2, "search_score"),
    ],
)
def test_the_dashboard_is_told_what_it_is(
    isolated_zenml: Path,
    tmp_path: Path,
    made: tuple[Any, ...],
    kind: type[BaseMaterializer],
    place: int,
    key: str,
) -> None:
    from zenml.client import Client

    told = kind(uri=str(tmp_path), artifact_store=Client().active_stack.artifact_store).extract_metadata(made[place])
    assert key in told
