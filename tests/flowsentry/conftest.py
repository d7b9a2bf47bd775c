from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pytest

from flowsentry.features.build import build
from flowsentry.features.splits import Splits, make_splits
from flowsentry.features.views import FeatureSet
from flowsentry.flows import labels
from flowsentry.flows.places import places
from flowsentry.flows.reports import collapse, identify
from flowsentry.learning.candidates import Recipe
from flowsentry.simulation import SimulationSettings, simulate


@dataclass(frozen=True)
class Small:
    """A simulated hour with all that is derived from it, as in the step engineer."""

    raw: pd.DataFrame
    """Reports as a source gives them."""
    reports: pd.DataFrame
    flows: pd.DataFrame
    views: dict[str, FeatureSet]
    splits: Splits
    """For the view `behaviour`."""
    paper_splits: Splits


@pytest.fixture(scope="session")
def small() -> Small:
    raw = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    flows = collapse(reports)
    flows["place"] = places(flows)
    views = {name: build(name, reports, flows, {"file a": "0"}) for name in ("behaviour", "paper")}
    splits, paper_splits = (
        make_splits(flows, seed=0, warm_up_seconds=view.manifest.warm_up_seconds, rotations=1)
        for view in views.values()
    )
    return Small(raw, reports, flows, views, splits, paper_splits)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe(
        labels="corrected", metric="recall_at_fpr", inner_folds=2, target_fpr=0.001, needs_effect=True, seed=0
    )
