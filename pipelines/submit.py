"""Run a pipeline where the active stack says, and sum up what came of it."""

from __future__ import annotations

from typing import Any, Protocol

from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline

from flowsentry.config import PipelineConfig
from flowsentry.errors import FlowSentryError, StackError
from pipelines.summary import RunSummary, run_name, summarise


class Place(Protocol):
    """Where runs go that do not happen in this process."""

    @property
    def scheduled(self) -> bool:
        """Whether pipelines are not run but put on a schedule."""

    def adapt(self, pipeline: Pipeline) -> Pipeline:
        """Give a prepared pipeline what it needs there."""

    def follow(self, run: PipelineRunResponse) -> None:
        """Wait for the end of a run; raises a FlowSentryError if it failed."""


def submit(
    pipeline: Pipeline, config: PipelineConfig, parameters: dict[str, Any], *, cache: bool, place: Place | None
) -> RunSummary | None:
    """Run a pipeline on the active stack and write its pages to the folder of reports.

    Args:
        pipeline: what to run.
        config: says where reports go.
        parameters: of the pipeline.
        cache: take the result of a step from an earlier run with the same inputs and the same code.
        place: where it runs; None: in this process.

    Returns:
        What the run found; if it failed with an error of ours, why, and the pages that it had made. None if it was not
        run but put on a schedule.

    Raises:
        StackError: ZenML began no run.
        FlowSentryError: it could not begin otherwise, or its pages cannot be written.
    """
    name = run_name(pipeline.name)
    prepared = pipeline.with_options(run_name=name, enable_cache=cache)
    if place:
        prepared.prepare(**parameters)
        prepared = place.adapt(prepared)
    try:
        begun = prepared(**parameters)
        if place and begun and not place.scheduled:
            place.follow(begun)
    except FlowSentryError as error:
        return summarise(name, config.reports, error)
    if place and place.scheduled:
        return None
    if begun is None:
        raise StackError(f"ZenML began no run {name}; its log says why")
    return summarise(name, config.reports)
