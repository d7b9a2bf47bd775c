"""Schedules of the cluster: CronJobs, one for each pipeline at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kubernetes.client import ApiException
from zenml.client import Client
from zenml.config.schedule import Schedule
from zenml.models import ScheduleResponse

from flowsentry.errors import StackError
from pipelines.submit import Place
from stacks.place import ClusterPlace

_PREFIX: Final = "flowsentry-"


def present() -> list[ScheduleResponse]:
    """All schedules of ours, by name."""
    found = Client().list_schedules(name=f"startswith:{_PREFIX}", is_archived=False, size=100)
    return sorted(found.items, key=lambda schedule: schedule.name)


def told() -> str:
    """The schedules for people, one a line."""
    return (
        "\n".join(f"{schedule.name.removeprefix(_PREFIX):12}{schedule.cron_expression}" for schedule in present())
        or "no pipeline is on a schedule"
    )


def remove(pipeline: str) -> bool:
    """Take a pipeline off its schedule, with its CronJob; runs that have begun go on. False if it had none.

    Raises:
        StackError: Kubernetes refuses it.
    """
    names = [schedule for schedule in present() if schedule.name == f"{_PREFIX}{pipeline}"]
    for schedule in names:
        try:
            Client().delete_schedule(schedule.id)
        except ApiException as error:
            raise StackError(f"the CronJob of schedule {schedule.name} cannot be removed: {error.reason}") from None
    return bool(names)


def place(cluster: Place | None, pipeline: str, cron: str) -> ClusterPlace:
    """The cluster as a place where a pipeline is put on a schedule, instead of the one that it has."""
    assert isinstance(cluster, ClusterPlace)
    remove(pipeline)
    return replace(cluster, schedule=Schedule(name=f"{_PREFIX}{pipeline}", cron_expression=cron))
