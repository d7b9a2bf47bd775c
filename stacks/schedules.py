"""Schedules of the cluster: CronJobs, one for each pipeline at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kubernetes.client import ApiException, BatchV1Api, CoreV1Api
from zenml.client import Client
from zenml.config.schedule import Schedule
from zenml.integrations.kubernetes.constants import KUBERNETES_CRON_JOB_METADATA_KEY
from zenml.models import ScheduleResponse

from flowsentry.errors import StackError
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


def remove(cluster: ClusterPlace, pipeline: str) -> bool:
    """Take a pipeline off its schedule, with its CronJob and the token of its runs. False if it had none.

    Raises:
        StackError: Kubernetes refuses it.
    """
    names = [schedule for schedule in present() if schedule.name == f"{_PREFIX}{pipeline}"]
    for schedule in names:
        try:
            tokens = _tokens(cluster, str(schedule.run_metadata.get(KUBERNETES_CRON_JOB_METADATA_KEY)))
            Client().delete_schedule(schedule.id)
            for token in tokens:
                CoreV1Api(cluster.api).delete_namespaced_secret(token, cluster.site.namespace)
        except ApiException as error:
            raise StackError(f"the CronJob of schedule {schedule.name} cannot be removed: {error.reason}") from None
    return bool(names)


def _tokens(cluster: ClusterPlace, cron_job: str) -> set[str]:
    """Secrets that ZenML made for a CronJob, and would leave behind."""
    try:
        job = BatchV1Api(cluster.api).read_namespaced_cron_job(cron_job, cluster.site.namespace)
    except ApiException as error:
        if error.status == 404:
            return set()
        raise
    variables = [one for container in job.spec.job_template.spec.template.spec.containers for one in container.env]
    named = [one.value_from.secret_key_ref for one in variables if one.value_from and one.value_from.secret_key_ref]
    return {secret.name for secret in named if secret.name.startswith("zenml-token-")}


def place(cluster: ClusterPlace, pipeline: str, cron: str) -> ClusterPlace:
    """The cluster as a place where a pipeline is put on a schedule, instead of the one that it has."""
    remove(cluster, pipeline)
    return replace(cluster, schedule=Schedule(name=f"{_PREFIX}{pipeline}", cron_expression=cron))
