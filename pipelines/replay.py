"""The pipeline `replay`: labelled flows to the live service."""

from __future__ import annotations

from zenml import pipeline
from zenml.config.cache_policy import CachePolicy
from zenml.enums import ExecutionMode

from flowsentry.config import ReplayConfig
from flowsentry.simulation import SimulationSettings
from pipelines.submit import Place, submit
from pipelines.summary import RunSummary
from steps import stages
from steps.code_digest import code_digest
from steps.load import load
from steps.replay import replay as send
from steps.uploads import shared
from steps.validate import validate


@pipeline(name="replay", execution_mode=ExecutionMode.FAIL_FAST, cache_policy=CachePolicy(cache_func=code_digest))
def replay(
    data: list[str],
    digests: dict[str, str],
    simulation: SimulationSettings,
    max_quarantine_share: float,
    source: str,
    speed: str,
) -> None:
    """Load → validate → replay, which is never answered from the cache."""
    reports, unreadable_rows, _ = load(data, digests, simulation)
    valid_reports, _, _, _, _ = validate(reports, unreadable_rows, max_quarantine_share)
    send(valid_reports, source, speed)


def run(config: ReplayConfig, *, cache: bool, place: Place | None = None) -> RunSummary | None:
    """Run the pipeline on the active stack and write its pages to the folder of reports; see `submit`.

    Args:
        config: what to do.
        cache: take flows that were loaded and validated before.
        place: where it runs; None: in this process.

    Raises:
        FlowSentryError: it could not begin, as nothing is in production, or its pages cannot be written.
    """
    stages.deployer().endpoint()  # before minutes of work, not after
    data, digests = shared(config)
    parameters = {
        "data": data,
        "digests": digests,
        "simulation": config.simulation,
        "max_quarantine_share": config.validation.max_quarantine_share,
        "source": f"simulated flows, seed {config.simulation.seed}" if config.simulated else ", ".join(config.data),
        "speed": config.speed,
    }
    return submit(replay, config, parameters, cache=cache, place=place)
