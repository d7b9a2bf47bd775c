"""The pipeline `replay`: labelled flows to the live service."""

from __future__ import annotations

from zenml import pipeline
from zenml.config.cache_policy import CachePolicy
from zenml.enums import ExecutionMode

from flowsentry.config import ReplayConfig
from flowsentry.errors import FlowSentryError
from flowsentry.flows import sources
from flowsentry.simulation import SimulationSettings
from pipelines.summary import RunSummary, run_name, summarise
from steps import stages
from steps.code_digest import code_digest
from steps.load import load
from steps.replay import replay as send
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


def run(config: ReplayConfig, *, cache: bool) -> RunSummary:
    """Run the pipeline on the active stack and write its pages to the folder of reports.

    Args:
        config: what to do.
        cache: take flows that were loaded and validated before.

    Returns:
        What the run found; if it failed with an error of ours, why, and the pages that it had made.

    Raises:
        FlowSentryError: it could not begin, as nothing is in production, or its pages cannot be written.
    """
    stages.deployer().endpoint()  # before minutes of work, not after
    data = [] if config.simulated else list(config.data)
    digests = sources.digests(data) if data else {}
    name = run_name("replay")
    configured = replay.with_options(run_name=name, enable_cache=cache)
    try:
        configured(
            data=data,
            digests=digests,
            simulation=config.simulation,
            max_quarantine_share=config.validation.max_quarantine_share,
            source=", ".join(data) or f"simulated flows, seed {config.simulation.seed}",
            speed=config.speed,
        )
    except FlowSentryError as error:
        return summarise(name, config.reports, error)
    return summarise(name, config.reports)
