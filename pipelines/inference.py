"""The pipeline `inference`: from files to verdicts."""

from __future__ import annotations

from uuid import UUID

from zenml import pipeline
from zenml.client import Client
from zenml.config.cache_policy import CachePolicy
from zenml.enums import ExecutionMode

from flowsentry.config import InferenceConfig
from flowsentry.simulation import SimulationSettings
from pipelines.submit import Place, submit
from pipelines.summary import RunSummary
from steps import stages
from steps.code_digest import code_digest
from steps.detect import detect
from steps.load import load
from steps.uploads import shared
from steps.validate import validate


@pipeline(name="inference", execution_mode=ExecutionMode.FAIL_FAST, cache_policy=CachePolicy(cache_func=code_digest))
def inference(
    data: list[str],
    digests: dict[str, str],
    simulation: SimulationSettings,
    max_quarantine_share: float,
    detector: str,
    model_version: str,
) -> None:
    """Load → validate → detect. The detector is an input, so another champion is never answered from the cache."""
    reports, unreadable_rows, _ = load(data, digests, simulation)
    valid_reports, quarantine, _, rows, _ = validate(reports, unreadable_rows, max_quarantine_share)
    # Asked of the client itself, ZenML would look the artifact up in the step, and the cache would not know it.
    artifact = Client().zen_store.get_artifact_version(UUID(detector))
    detect(valid_reports, quarantine, rows, artifact, model_version)


def run(
    config: InferenceConfig, *, cache: bool, model_version: str | None, place: Place | None = None
) -> RunSummary | None:
    """Run the pipeline on the active stack and write verdicts and pages to the folder of reports; see `submit`.

    Args:
        config: what to do.
        cache: take the result of a step from an earlier run with the same inputs and the same code.
        model_version: number of the version that judges; None: the champion, or if nothing is deployed the version at
            stage production.
        place: where it runs; None: in this process.

    Raises:
        FlowSentryError: it could not begin, as there is no such model version, or its pages cannot be written.
    """
    judge = stages.judge(model_version, stages.deployer().record())
    print(f"model version {judge.model_version} judges: {judge.why}")
    data, digests = shared(config)
    parameters = {
        "data": data,
        "digests": digests,
        "simulation": config.simulation,
        "max_quarantine_share": config.validation.max_quarantine_share,
        "detector": str(judge.detector.id),
        "model_version": judge.model_version,
    }
    return submit(inference, config, parameters, cache=cache, place=place)
