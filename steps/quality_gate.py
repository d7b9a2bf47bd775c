"""Step quality_gate: is the challenger good enough, on flows that neither it nor the champion has learned from."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import pandas as pd
from zenml import log_metadata, save_artifact, step
from zenml.types import HTMLString

from flowsentry.config import QualityGateSettings
from flowsentry.detector import Detector
from flowsentry.errors import GateFailed, StoreError
from flowsentry.features.splits import Splits
from flowsentry.features.views import FeatureSet
from flowsentry.learning.candidates import Recipe, judge_baselines
from flowsentry.learning.quality_gate import (
    FOLD,
    Exposure,
    QualityDecision,
    Scored,
    Unscored,
    by_flow,
    judge,
    seen,
)
from flowsentry.reporting.gates import gates_html
from flowsentry.serving.deployer import Deployed
from materializers import ModelMaterializer
from steps import stages


@step(
    enable_cache=False,  # another champion may have come
    output_materializers={"quality_decision": ModelMaterializer},
)
def quality_gate(
    detector: Detector,
    model_version: str,
    reports: pd.DataFrame,
    flows: pd.DataFrame,
    features: FeatureSet,
    splits: Splits,
    recipe: Recipe,
    settings: QualityGateSettings,
) -> Annotated[QualityDecision, "quality_decision"]:
    """Compare challenger and champion on the same flows.

    Args:
        detector: the challenger.
        model_version: its version.
        reports: validated, with flow numbers and derived labels.
        flows: flow table of the reports.
        features: the challenger's view of them.
        splits: of the same flows.
        recipe: how the challenger was trained.
        settings: metric, bars and tolerances.

    Raises:
        GateFailed: it is not; the decision is stored all the same.
    """
    deployed = stages.deployer().record().champion
    shipped = replace(splits, folds=tuple(splits.of(FOLD)), parts=splits.parts[[FOLD]])
    scored, learned = _champion(deployed, reports, flows)
    decision = judge(
        flows,
        splits.rows(FOLD, "validation"),
        challenger=by_flow(detector.verdicts(reports, explained=False), flows, model_version),
        champion=scored,
        champion_digest=deployed.digest if deployed else None,
        seen=learned,
        baselines=judge_baselines(features, flows, shipped, recipe),
        labels=recipe.labels,
        settings=settings,
        seed=recipe.seed,
    )
    log_metadata({"passed": decision.passed, "reason": decision.reason, "basis": decision.basis})
    if not decision.passed:
        # A failed step has no outputs.
        save_artifact(decision, "quality_decision", materializer=ModelMaterializer)
        save_artifact(HTMLString(gates_html(decision, None)), "gates_page")
        raise GateFailed(f"model version {model_version} is not good enough: {decision.reason}")
    print(f"quality gate passed: {decision.reason}")
    return decision


def _champion(
    deployed: Deployed | None, reports: pd.DataFrame, flows: pd.DataFrame
) -> tuple[Scored | Unscored | None, np.ndarray | None]:
    """The champion's scores of all flows, and which of them it has learned from.

    Where nothing is deployed the champion is the version at stage production: a lost home of the deployer does not
    lower the bar.
    """
    stored = stages.version(deployed) if deployed else stages.staged()
    if stored is None:
        if deployed is None:
            return None, None
        return Unscored(
            deployed.model_version,
            f"this ZenML store does not know its bundle {deployed.digest[:12]}; train in the store that it came from, "
            "or go back to the version before it with python run.py --rollback",
        ), None
    name = str(stored.name)
    detector, learned = (stored.get_artifact(artifact) for artifact in ("detector", "exposure"))
    if detector is None:
        return Unscored(name, "its detector is missing in ZenML"), None
    try:
        champion: Detector = detector.load()
        exposure: Exposure | None = learned.load() if learned else None
    except (StoreError, OSError) as error:
        return Unscored(name, str(error)), None
    scored = by_flow(champion.verdicts(reports, explained=False), flows, name)
    return scored, seen(flows, exposure) if exposure else None
