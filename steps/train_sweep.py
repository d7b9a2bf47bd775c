"""Step train_sweep: search, fit and judge one family in every fold. One step for each family, side by side."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, step

from flowsentry.features.splits import Splits
from flowsentry.features.views import FeatureSet
from flowsentry.learning import candidates
from flowsentry.learning.candidates import Candidate, Recipe
from flowsentry.learning.families import FAMILIES
from materializers import CandidateMaterializer


@step(output_materializers=CandidateMaterializer)
def train_sweep(
    features: FeatureSet, flows: pd.DataFrame, splits: Splits, family: str, recipe: Recipe
) -> Annotated[Candidate, "candidate"]:
    """Train one family.

    Args:
        features: the view's values.
        flows: flow table.
        splits: folds of all protocols.
        family: a key of `FAMILIES`.
        recipe: how to train.
    """
    candidate = candidates.train(FAMILIES[family], features, flows, splits, recipe, print)
    chosen = ", ".join(f"{name} {value}" for name, value in candidate.search.best.items())
    print(f"{FAMILIES[family].title}: {chosen}; {candidate.seconds:.0f} s")
    log_metadata({"family": family, "best": dict(candidate.search.best), "seconds": candidate.seconds})
    return candidate
