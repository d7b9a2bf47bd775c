"""Step deploy: the challenger beside the champion, through the service gate, into production."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import pandas as pd
from zenml import log_metadata, save_artifact, step
from zenml.types import HTMLString

from flowsentry.config import ServiceGateSettings
from flowsentry.detector import Detector
from flowsentry.errors import FlowSentryError, GateFailed
from flowsentry.features.splits import Splits
from flowsentry.learning.quality_gate import FOLD, QualityDecision
from flowsentry.reporting.gates import gates_html
from flowsentry.serving.bundle import Bundle
from flowsentry.serving.service_gate import ServiceDecision, check, trial
from materializers import ModelMaterializer
from steps.stages import deployer, keep_equal


@step(
    enable_cache=False,  # what is in production is no function of the inputs
    output_materializers={"service_decision": ModelMaterializer},
)
def deploy(
    bundle: Bundle,
    detector: Detector,
    model_version: str,
    quality_decision: QualityDecision,
    reports: pd.DataFrame,
    flows: pd.DataFrame,
    splits: Splits,
    settings: ServiceGateSettings,
) -> tuple[
    Annotated[ServiceDecision, "service_decision"],
    Annotated[str, "address"],
    Annotated[HTMLString, "gates_page"],
]:
    """Serve the bundle as challenger, hold its answers against the detector's own, and make it the champion.

    Args:
        bundle: of the detector.
        detector: whose offline verdicts the service has to give.
        model_version: of both.
        quality_decision: of the gate before, for the page.
        reports: validated, with flow numbers and derived labels, of whole recordings.
        flows: flow table of the reports.
        splits: of the same flows; the part `validation` is held against the model card.
        settings: of the service gate.

    Returns:
        The decision, the champion's stable address, and both gates as a page.

    Raises:
        DeployError: the challenger did not start, or could not be made the champion; the champion serves as before.
        GateFailed: its service is not what was tested; it is stopped, the champion serves as before.
    """
    where = deployer()
    champion = where.record().champion
    is_champion = champion is not None and champion.digest == bundle.digest
    validation = splits.rows(FOLD, "validation")
    if is_champion:
        print(f"model version {model_version} is the champion already; its answers are checked again")
        decision = check(
            where.endpoint(),
            detector,
            reports,
            flows,
            validation,
            detector.card,
            settings,
            model_version=model_version,
            digest=bundle.digest,
            on_progress=print,
        )
    else:
        decision = trial(
            where,
            bundle.path,
            bundle.digest,
            detector,
            reports,
            flows,
            validation,
            settings,
            model_version=model_version,
            on_progress=print,
        )
    page = HTMLString(gates_html(quality_decision, decision))
    log_metadata({"passed": decision.passed, "reason": decision.reason})
    with _kept(decision, page):
        if not decision.passed:
            raise GateFailed(f"the service of model version {model_version} is not what was tested: {decision.reason}")
        record = where.record() if is_champion else where.promote(bundle.digest, quality_decision.champion_digest)
        keep_equal(record)
        address = where.endpoint().url
    print(f"model version {model_version} is the champion at {address}")
    return decision, address, page


@contextmanager
def _kept(decision: ServiceDecision, page: HTMLString) -> Iterator[None]:
    """Store decision and page also of a step that fails, which has no outputs."""
    try:
        yield
    except FlowSentryError:
        save_artifact(decision, "service_decision", materializer=ModelMaterializer)
        save_artifact(page, "gates_page")
        raise
