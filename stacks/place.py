"""The cluster as a place for pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zenml.config.schedule import Schedule
from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline

from stacks import cluster_settings
from stacks.follow import follow
from stacks.site import Site


@dataclass(frozen=True)
class ClusterPlace:
    """Runs become pods of the site, or CronJobs if there is a schedule."""

    site: Site
    api: Any
    """Client of its Kubernetes API."""
    schedule: Schedule | None = None

    @property
    def scheduled(self) -> bool:
        """Whether pipelines are not run but put on a schedule."""
        return self.schedule is not None

    def adapt(self, pipeline: Pipeline) -> Pipeline:
        """Give a prepared pipeline what its pods need."""
        return cluster_settings.configured(pipeline, self.site, self.schedule)

    def follow(self, run: PipelineRunResponse) -> None:
        """Wait for the end of a run.

        Raises:
            StackError: it failed.
        """
        follow(run, self.site, self.api)
