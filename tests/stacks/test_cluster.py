"""Whole runs as pods, on a Kubernetes with services and images of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client, config

from stacks.site import ROOT
from tests.conftest import Cluster
from tests.stacks.test_services import Installed, installed

__all__ = ["installed"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SMALL = """\
simulation: {minutes: 60, scale: 0.1, attacks: [syn-flood, port-scan], hard_negatives: [store-restart], episodes: 1}
families: [decision_tree]
splits: {rotations: 1}
select: {max_fpr: 0.5}
deploy: false
"""


@pytest.fixture(scope="module")
def ready(cluster: Cluster, installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a user whose images are built and whose services run."""
    environment = os.environ | installed.environment
    environment.pop("FLOWSENTRY_SITE_TAG", None)  # that of the images, which are built once for equal inputs
    environment |= {
        "FLOWSENTRY_SITE_REGISTRY": cluster.registry,
        "ZENML_CONFIG_PATH": str(tmp_path_factory.mktemp("zenml")),
    }
    done = subprocess.run([sys.executable, "-m", "stacks.images"], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
    return environment


def begin(folder: Path, environment: dict[str, str], settings: str, *arguments: str) -> subprocess.Popen[str]:
    """run.py --pipeline train --stack cluster, as a user starts it."""
    (folder / "small.yaml").write_text(settings)
    # Whoever runs tests in the background may have told them to ignore it, which the new process would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, "-u", str(ROOT / "run.py"), "--pipeline", "train", "--stack", "cluster"]
        return subprocess.Popen(
            [*command, "--config", "small.yaml", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """What it prints, until it ends."""
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            yield line.rstrip()


def pods(installed: Installed, step: str) -> list[client.V1Pod]:
    found: list[client.V1Pod] = installed.core.list_namespaced_pod(
        installed.namespace, label_selector=f"step_name={step}"
    ).items
    return found


def test_every_step_is_a_pod_and_one_that_is_killed_is_started_again(
    installed: Installed, ready: dict[str, str], tmp_path: Path
) -> None:
    process, told, killed = begin(tmp_path, ready, SMALL), [], ""
    for line in lines(process):
        told.append(line)
        if line == "step validate: running" and not killed:
            killed = pods(installed, "validate")[0].metadata.name
            installed.core.delete_namespaced_pod(killed, installed.namespace, grace_period_seconds=0)
    assert process.returncode == 0
    assert killed
    for step in ("load", "validate", "engineer", "check_protocol", "train_sweep_decision_tree", "evaluate", "select"):
        assert any(line.startswith(f"step {step}: completed in ") for line in told)
        (pod, *_) = pods(installed, step)
        assert pod.metadata.name != killed
        assert pod.metadata.labels["flowsentry/pod"] == "step"
        assert not [volume for volume in pod.spec.volumes if volume.name.startswith("kube-api-access")], "a token"
    assert any(line.startswith("Selected: Decision tree") for line in told)
    assert list((tmp_path / "reports").glob("train-*/evaluation.html"))


def test_a_failed_step_ends_the_run_at_once_with_its_error(
    installed: Installed, ready: dict[str, str], tmp_path: Path
) -> None:
    process = begin(tmp_path, ready, SMALL.replace("select: {", "select: {protocol: recording, "))
    told = list(lines(process))
    assert process.returncode == 1
    *_, why, step = told
    assert why.startswith("error: the run train-")
    assert why.endswith("is failed")
    assert step.startswith("step check_protocol: protocol recording cannot be carried out on these flows")
    assert len(pods(installed, "check_protocol")) <= 2, "another attempt would have ended the same"


def test_a_run_goes_on_without_its_client_and_can_be_stopped(
    installed: Installed, ready: dict[str, str], tmp_path: Path
) -> None:
    process = begin(tmp_path, ready, SMALL, "--no-cache")
    told = []
    for line in lines(process):
        told.append(line)
        if line == "step load: running":
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert "goes on in the cluster" in told[-1]
    run = told[-1].rpartition("python -m stacks.stop ")[2]
    selector = f"run_id={run},flowsentry/pod=orchestrator"
    (pod,) = installed.core.list_namespaced_pod(installed.namespace, label_selector=selector).items
    assert pod.status.phase in ("Pending", "Running")
    subprocess.run([sys.executable, "-m", "stacks.stop", run], cwd=ROOT, env=ready, check=True)
    phase, until = "Running", time.monotonic() + 120
    while phase == "Running" and time.monotonic() < until:
        time.sleep(1)
        phase = installed.core.read_namespaced_pod(pod.metadata.name, installed.namespace).status.phase
    assert phase in ("Succeeded", "Failed")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("TAG", "no-such-tag", "flowsentry-pipeline:no-such-tag: is not in the registry; run make images"),
        ("NAMESPACE", "no-such-namespace", "namespace no-such-namespace: does not exist; run make cluster-services"),
        ("ZENML_URL", "http://127.0.0.1:9", "ZenML server http://127.0.0.1:9: does not answer"),
        ("S3_URL", "http://127.0.0.1:9", "object store http://127.0.0.1:9: does not answer"),
        ("MLFLOW_URL", "http://127.0.0.1:9", "MLflow http://127.0.0.1:9: does not answer"),
    ],
)
def test_what_is_missing_is_named_and_nothing_runs(
    key: str, value: str, expected: str, ready: dict[str, str], tmp_path: Path
) -> None:
    process = begin(tmp_path, ready | {f"FLOWSENTRY_SITE_{key}": value}, SMALL)
    told = list(lines(process))
    assert process.returncode == 1
    assert told[0] == "error: the cluster is not ready, nothing was run:"
    assert any(expected in line for line in told)


@pytest.mark.parametrize(("kind", "name"), [("secret", "flowsentry-client"), ("service_account", "step")])
def test_an_object_that_is_missing_is_named(
    kind: str, name: str, installed: Installed, ready: dict[str, str], tmp_path: Path
) -> None:
    core = client.CoreV1Api(config.new_client_from_config())
    kept = getattr(core, f"read_namespaced_{kind}")(name, installed.namespace)
    getattr(core, f"delete_namespaced_{kind}")(name, installed.namespace)
    try:
        told = list(lines(begin(tmp_path, ready, SMALL)))
        assert any(f"{name}: missing in namespace {installed.namespace}" in line for line in told)
    finally:
        kept.metadata = client.V1ObjectMeta(name=name, labels=kept.metadata.labels)
        getattr(core, f"create_namespaced_{kind}")(installed.namespace, kept)
