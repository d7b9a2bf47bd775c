"""Step select: the candidate that ships, or none."""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
from zenml import log_metadata, step
from zenml.types import HTMLString

from flowsentry.config import SelectSettings
from flowsentry.detector import Detector
from flowsentry.errors import NothingSelected
from flowsentry.features.splits import Splits
from flowsentry.learning.candidates import Candidate, Recipe
from flowsentry.learning.quality_gate import Exposure, exposure
from flowsentry.learning.selection import Selection, choose
from flowsentry.reporting.evaluation import validation_scores
from flowsentry.reporting.model_card import model_card, model_card_html
from flowsentry.reporting.results import Evaluation
from materializers import DetectorMaterializer, ExposureMaterializer, ModelMaterializer


@step(
    output_materializers={
        "selection": ModelMaterializer,
        "detector": DetectorMaterializer,
        "exposure": ExposureMaterializer,
    }
)
def select(
    evaluation: Evaluation,
    candidates: list[Candidate],
    flows: pd.DataFrame,
    splits: Splits,
    recipe: Recipe,
    settings: SelectSettings,
) -> tuple[
    Annotated[Selection, "selection"],
    Annotated[Detector, "detector"],
    Annotated[Exposure, "exposure"],
    Annotated[HTMLString, "model_card"],
]:
    """Choose by the configured metric and protocol; nothing ships that does not beat the identity-free baselines.

    Args:
        evaluation: of all candidates and baselines.
        candidates: the same candidates.
        flows: flow table.
        splits: folds of all protocols.
        recipe: how the candidates were trained.
        settings: which score under which protocol decides.

    Returns:
        The decision; the detector with its model card; the flows that it has learned from; the card as a page.

    Raises:
        NothingSelected: no candidate is good enough.
    """
    selection = choose(
        evaluation,
        protocol=settings.protocol,
        metric=settings.metric,
        labels=recipe.labels,
        max_fpr=settings.max_fpr,
    )
    log_metadata({"decision": selection.chosen or "nothing", "reason": selection.reason, "scores": scores(selection)})
    if selection.chosen is None:
        raise NothingSelected(selection.reason)
    candidate = next(c for c in candidates if c.family == selection.chosen)
    parts = splits.parts["random"]
    card = model_card(
        evaluation=evaluation,
        selection=selection,
        manifest=candidate.detector.manifest,
        parameters=candidate.search.best,
        rows={str(part): int(count) for part, count in parts.value_counts().items() if count},
        target_fpr=recipe.target_fpr,
        validation=validation_scores(flows, splits, {candidate.family: candidate.scores})[candidate.family],
    )
    print(f"selected: {selection.reason}")
    learned = exposure(flows, splits)
    return selection, candidate.detector.with_card(card), learned, HTMLString(model_card_html(card))


def scores(selection: Selection) -> dict[str, Any]:
    """What the ranking says of each candidate and baseline, by name, for metadata; without what is undefined."""
    return {
        ranked.name: {key: value for key, value in ranked.model_dump().items() if value is not None}
        for ranked in selection.ranking
    }
