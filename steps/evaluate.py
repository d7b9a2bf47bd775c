"""Step evaluate: all candidates and baselines side by side under all protocols, in a report and in MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from zenml import get_step_context, log_metadata, step
from zenml.types import HTMLString

from flowsentry.features.splits import Splits
from flowsentry.features.views import FeatureSet
from flowsentry.learning import tracking
from flowsentry.learning.candidates import Candidate, Recipe, judge_baselines
from flowsentry.learning.families import FAMILIES
from flowsentry.reporting.evaluation import evaluate as evaluate_scores
from flowsentry.reporting.report import evaluation_html
from flowsentry.reporting.results import Evaluation
from materializers import ModelMaterializer
from steps.tracking import connect


@step(output_materializers={"evaluation": ModelMaterializer})
def evaluate(
    candidates: list[Candidate],
    features: FeatureSet,
    flows: pd.DataFrame,
    splits: Splits,
    recipe: Recipe,
    rows: dict[str, int],
) -> tuple[Annotated[Evaluation, "evaluation"], Annotated[HTMLString, "report"]]:
    """Score all candidates beside the baselines.

    Args:
        candidates: one for each family.
        features: the view's values.
        flows: flow table with `place`.
        splits: folds of all protocols.
        recipe: how the candidates were trained.
        rows: the account of rows.
    """
    baselines = judge_baselines(features, flows, splits, recipe)
    scores = {candidate.family: candidate.scores for candidate in candidates}
    evaluation = evaluate_scores(
        flows,
        splits,
        scores,
        {name: table for name, (_, table) in baselines.items()},
        titles={name: family.title for name, family in FAMILIES.items()}
        | {name: baseline.title for name, (baseline, _) in baselines.items()},
        uses_identity=dict.fromkeys(scores, any(feature.identity for feature in features.manifest.features))
        | {name: baseline.uses_identity for name, (baseline, _) in baselines.items()},
        limit=candidates[0].detector.limit,
        data={
            "view": features.manifest.name,
            "view_digest": features.manifest.digest,
            "trained_on": f"{recipe.labels} labels",
            "rows": dict(rows),
            "lineage": dict(features.manifest.lineage),
            "baselines": {name: baseline.learned for name, (baseline, _) in baselines.items()},
        },
    )
    log_metadata({"rows": dict(rows), "protocols": list(evaluation.protocols)})
    if connect():
        for candidate in candidates:
            _track(candidate, evaluation, features)
    return evaluation, HTMLString(evaluation_html(evaluation, flows, splits, scores))


def _track(candidate: Candidate, evaluation: Evaluation, features: FeatureSet) -> None:
    """Log one candidate to MLflow."""
    scores = evaluation.entry(candidate.family).scores
    metrics: dict[str, float] = {}
    confusion: dict[str, np.ndarray] = {}
    for protocol, by_labels in scores.items():
        for labels, result in by_labels.items():
            measured = {**result.mean.model_dump(), "family_recall": result.family_recall.mean}
            measured |= {f"own_{name}": value for name, value in result.own_mean.model_dump().items()}
            metrics |= {f"{protocol}/{name}/{labels}": value for name, value in measured.items() if value is not None}
        counts = by_labels["corrected"].counts
        confusion[protocol] = np.array([[counts.tn, counts.fp], [counts.fn, counts.tp]], np.int64)
    lineage = features.manifest.lineage
    with tempfile.TemporaryDirectory() as folder:
        candidate.detector.save(Path(folder))
        tracking.log_candidate(
            FAMILIES[candidate.family],
            candidate.search.best,
            result=candidate.search,
            metrics=metrics,
            confusion=confusion,
            tags={
                "data_digest": ", ".join(digest for name, digest in lineage.items() if name.startswith("file ")),
                "view_digest": features.manifest.digest,
                "zenml_run": get_step_context().pipeline_run.name,
            },
            model_folder=Path(folder),
        )
