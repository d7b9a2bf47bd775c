"""How pipelines run as pods: images, security, resources, repetitions. Pipelines themselves know nothing of it.

Settings that ZenML would ignore in silence when misspelt are made from its own typed classes, which a test holds
against their fields, as those accept any name.
"""

from __future__ import annotations

from typing import Any, Final

from zenml.config import DockerSettings
from zenml.config.cache_policy import CachePolicy
from zenml.config.retry_config import StepRetryConfig
from zenml.config.schedule import Schedule
from zenml.integrations.kubernetes.flavors import KubernetesOrchestratorSettings
from zenml.integrations.kubernetes.pod_settings import KubernetesPodSettings
from zenml.pipelines.pipeline_definition import Pipeline

from flowsentry import telemetry
from stacks.cluster import deployer_environment
from stacks.site import Site
from steps.code_digest import code_digest

MAX_PARALLELISM: Final = 4
"""Step pods of one run at a time; the scheduler makes them wait if they do not fit."""
MAX_RETRIES: Final = 2
RUN_SECONDS: Final = 6 * 3600
"""Longest that a run, and each attempt of a step, may take."""
KEPT_SECONDS: Final = 24 * 3600
"""How long finished pods, and so their logs, stay."""
FINAL_EXIT: Final = 70
"""Exit status of a step that failed with an error of ours (see `steps`): to repeat it would end the same."""

USER: Final = 1000
WITH_TOKEN: Final = {"deploy", "quality_gate", "replay"}
"""Steps that ask Kubernetes what is in production, as the account `deployer`; all others have no token."""

_REQUESTS: Final = {
    # step: CPU, memory, limit of memory; a limit of CPU would only slow down what nobody else needs
    "load": ("200m", "600Mi", "2Gi"),
    "validate": ("200m", "700Mi", "3Gi"),
    "engineer": ("300m", "700Mi", "3Gi"),
    "train_sweep": ("400m", "700Mi", "4Gi"),
    "evaluate": ("300m", "800Mi", "4Gi"),
    "quality_gate": ("300m", "700Mi", "3Gi"),
    "deploy": ("300m", "700Mi", "3Gi"),
    "detect": ("300m", "700Mi", "3Gi"),
    "replay": ("300m", "700Mi", "2Gi"),
}
_ORDINARY: Final = ("150m", "600Mi", "2Gi")
_ORCHESTRATOR: Final = ("100m", "400Mi", "1Gi")

LARGEST_REQUEST_MIB: Final = 800
"""Of memory, of all pods of a run."""

SECURITY: Final[dict[str, Any]] = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Of every container."""

VOLUMES: Final[list[dict[str, Any]]] = [{"name": "tmp", "emptyDir": {}}, {"name": "app", "emptyDir": {}}]
MOUNTS: Final[list[dict[str, Any]]] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "app", "mountPath": "/app"}]
"""All that can be written: ZenML makes and enters /app, and unpacks the code there."""


def configured(pipeline: Pipeline, site: Site, schedule: Schedule | None = None) -> Pipeline:
    """A pipeline that is prepared (so that its steps are known) with all that its pods need.

    Args:
        pipeline: after `prepare`.
        site: gives image and namespace.
        schedule: makes it a CronJob instead of a run.
    """
    steps: dict[str, Any] = {
        name: {"settings": {"orchestrator": step_settings(invocation.step.name)}}
        for name, invocation in pipeline.invocations.items()
    }
    return pipeline.with_options(
        # every run of a schedule needs a name of its own
        run_name=f"{pipeline.name}-{{date}}-{{time}}" if schedule else None,
        schedule=schedule,
        steps=steps,
        settings={
            "docker": DockerSettings(
                parent_image=site.pipeline_image, skip_build=True, allow_download_from_artifact_store=True
            ),
            "orchestrator": run_settings(site),
        },
        retry=StepRetryConfig(max_retries=MAX_RETRIES),
        # The orchestrator's pod, which looks into the cache before it starts a step's, has no code that it could ask:
        # what results depend on is an environment variable, as these are part of ZenML's key.
        cache_policy=CachePolicy(cache_func=None),
        environment={"FLOWSENTRY_CODE": f"{code_digest()} {site.tag}"},
    )


def run_settings(site: Site) -> KubernetesOrchestratorSettings:
    """Of the orchestrator's pod and, where a step says nothing else, of step pods."""
    return KubernetesOrchestratorSettings(
        synchronous=False,  # `stacks.follow` waits, which sees more and can be interrupted
        max_parallelism=MAX_PARALLELISM,
        job_monitoring_interval=1.0,
        active_deadline_seconds=RUN_SECONDS,
        ttl_seconds_after_finished=KEPT_SECONDS,
        successful_jobs_history_limit=3,
        failed_jobs_history_limit=3,
        concurrency_policy="Forbid",
        pod_settings=_pod(site, "step", _ORDINARY, token=False),
        orchestrator_pod_settings=_pod(site, "orchestrator", _ORCHESTRATOR, token=True),
    )


def step_settings(step: str) -> KubernetesOrchestratorSettings:
    """What a step has of its own; lists would replace those of the run, so only keys with values are here."""
    pod: dict[str, Any] = {"resources": _resources(_REQUESTS.get(step, _ORDINARY))}
    more: dict[str, Any] = {}
    if step in WITH_TOKEN:
        pod |= {
            "labels": {"flowsentry/pod": "deployer"},
            "additional_pod_spec_args": {"automount_service_account_token": True},
        }
        more["step_pod_service_account_name"] = "deployer"
    return KubernetesOrchestratorSettings(
        pod_settings=KubernetesPodSettings(**pod),
        pod_failure_policy={
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "main", "operator": "In", "values": [FINAL_EXIT]},
                },
            ]
        },
        **more,
    )


def environment(site: Site) -> dict[str, str]:
    """Of every pod of a run."""
    return {
        "HOME": "/tmp",
        "ZENML_CONFIG_PATH": "/tmp/zenml",
        "MPLCONFIGDIR": "/tmp/matplotlib",
        "NUMBA_CACHE_DIR": "/tmp/numba",
        "GIT_PYTHON_REFRESH": "quiet",  # otherwise a page of warnings that there is no git
        "FLOWSENTRY_FINAL_EXIT": str(FINAL_EXIT),
        **deployer_environment(site),
        **telemetry.OFF,
    }


def _pod(site: Site, kind: str, requests: tuple[str, str, str], *, token: bool) -> KubernetesPodSettings:
    return KubernetesPodSettings(
        labels={"app.kubernetes.io/part-of": "flowsentry", "flowsentry/pod": kind},
        env=[{"name": name, "value": value} for name, value in environment(site).items()],
        volumes=VOLUMES,
        volume_mounts=MOUNTS,
        resources=_resources(requests),
        container_security_context=SECURITY,
        additional_pod_spec_args={
            "automount_service_account_token": token,
            "enable_service_links": False,  # a Service called zenml would otherwise set ZENML_PORT and the like
            "security_context": {"runAsNonRoot": True, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    )


def _resources(requests: tuple[str, str, str]) -> dict[str, dict[str, str]]:
    cpu, memory, limit = requests
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": limit}}
