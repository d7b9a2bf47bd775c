from __future__ import annotations

from typing import Any

import pytest
from kubernetes.client import ApiClient
from kubernetes.utils.quantity import parse_quantity
from zenml.config.base_settings import BaseSettings
from zenml.integrations.kubernetes.flavors import KubernetesOrchestratorSettings
from zenml.integrations.kubernetes.manifest_utils import build_pod_manifest
from zenml.integrations.kubernetes.pod_settings import KubernetesPodSettings

from flowsentry.config import TrainConfig
from pipelines.train import train
from stacks import cluster_settings, preflight
from stacks.site import Site
from steps.code_digest import code_digest

SITE = Site("c", "ns", "h", "r:1", "1", "http://h:1", "http://h:2", "http://h:3", "http://h:4")
STEPS = [*cluster_settings._REQUESTS, "select"]


def unknown(settings: BaseSettings) -> set[str]:
    """Names that ZenML would accept and ignore."""
    return set(settings.model_dump()) - set(type(settings).model_fields)


def pod(settings: KubernetesPodSettings | None) -> dict[str, Any]:
    """What ZenML makes of it."""
    manifest = build_pod_manifest(
        pod_name="x", image_name="i", command=[], args=[], privileged=False, pod_settings=settings
    )
    result: dict[str, Any] = ApiClient().sanitize_for_serialization(manifest)
    return result


@pytest.mark.parametrize("step", STEPS)
def test_no_setting_has_a_name_that_zenml_would_ignore(step: str) -> None:
    for settings in (cluster_settings.run_settings(SITE), cluster_settings.step_settings(step)):
        assert not unknown(settings)
        for inner in (settings.pod_settings, settings.orchestrator_pod_settings):
            assert inner is None or not unknown(inner)


@pytest.mark.parametrize("kind", ["pod_settings", "orchestrator_pod_settings"])
def test_every_pod_satisfies_the_restricted_profile(kind: str) -> None:
    made = pod(getattr(cluster_settings.run_settings(SITE), kind))
    (container,) = made["spec"]["containers"]
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert made["spec"]["enableServiceLinks"] is False
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/app"}
    assert container["resources"]["requests"] and container["resources"]["limits"]


def test_only_the_orchestrator_and_steps_that_ask_kubernetes_have_a_token() -> None:
    run = cluster_settings.run_settings(SITE)
    assert pod(run.orchestrator_pod_settings)["spec"]["automountServiceAccountToken"] is True
    assert pod(run.pod_settings)["spec"]["automountServiceAccountToken"] is False
    for step in STEPS:
        own = cluster_settings.step_settings(step)
        assert (own.step_pod_service_account_name == "deployer") is (step in cluster_settings.WITH_TOKEN)


def test_the_preflight_looks_for_a_node_that_holds_the_largest_pod() -> None:
    run = cluster_settings.run_settings(SITE)
    asked = [run.pod_settings, run.orchestrator_pod_settings]
    asked += [cluster_settings.step_settings(step).pod_settings for step in STEPS]
    memory = [parse_quantity(one.resources["requests"]["memory"]) for one in asked if one]
    assert max(memory) == preflight.MEMORY_MIB << 20


@pytest.mark.usefixtures("isolated_zenml")
def test_a_pipeline_gets_its_settings_from_outside_and_every_step_its_own() -> None:
    config = TrainConfig(families=["decision_tree", "tails"], deploy=False)
    parameters = {
        "data": [],
        "digests": {},
        "simulation": config.simulation,
        "max_quarantine_share": 0.05,
        "view": "behaviour",
        "splitting": config.splits,
        "families": list(config.families),
        "recipe": recipe(config),
        "selecting": config.select,
        "deploying": False,
        "quality": config.quality_gate,
        "service": config.service_gate,
    }
    prepared = train.copy()
    prepared.prepare(**parameters)
    configured = cluster_settings.configured(prepared, SITE)
    steps = configured._run_args["step_configurations"]
    assert {"load", "train_sweep_decision_tree", "train_sweep_tails", "register"} <= set(steps)
    sweep = steps["train_sweep_tails"]["settings"]["orchestrator"]
    assert isinstance(sweep, KubernetesOrchestratorSettings)
    assert sweep == cluster_settings.step_settings("train_sweep")
    retry = configured.configuration.retry
    assert retry is not None and retry.max_retries == cluster_settings.MAX_RETRIES
    docker = configured.configuration.settings["docker"].model_dump()
    assert (docker["parent_image"], docker["skip_build"]) == (SITE.pipeline_image, True)
    policy = configured.configuration.cache_policy
    assert policy is not None and policy.cache_func is None, "the orchestrator's pod has no code to ask"
    assert code_digest() in configured.configuration.environment["FLOWSENTRY_CODE"]
    assert train.configuration.settings == {}, "the pipeline itself stays what it is"


def recipe(config: TrainConfig) -> Any:
    from flowsentry.learning.candidates import Recipe

    return Recipe(
        labels=config.labels,
        metric=config.search.metric,
        inner_folds=config.search.folds,
        target_fpr=config.limit.target_fpr,
        needs_effect=config.limit.minimum_effect,
        seed=0,
    )
