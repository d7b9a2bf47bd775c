"""What keeps pods from becoming ready, read from what the Kubernetes API says of them. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from flowsentry.serving.manifests import ATTEMPT, FETCH, Object

_BLOCKED: Final = {
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
}
"""Reasons for which a container waits that seldom pass by themselves."""


@dataclass(frozen=True)
class Trouble:
    """Why a pod is not ready."""

    what: str
    pod: str | None = None
    container: str | None = None
    """Whose log may say more."""
    is_restarted: bool = False
    """It is the log of the container before the present one."""
    is_lasting: bool = True
    """Waiting helps seldom."""


def is_rolled_out(deployment: Object, replicas: int) -> bool:
    """Whether so many pods of a Deployment's present form are ready, and none of an earlier one is left."""
    status: dict[str, int] = deployment.get("status", {})
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
        and status.get("updatedReplicas", 0) == status.get("replicas", 0)
        and min(status.get("updatedReplicas", 0), status.get("readyReplicas", 0)) >= replicas
    )


def present(deployment: Object, pods: list[Object]) -> list[Object]:
    """The pods of a Deployment's present form that are not being removed."""
    attempt = deployment["spec"]["template"]["metadata"]["labels"].get(ATTEMPT)
    return [
        pod
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"] and pod["metadata"]["labels"].get(ATTEMPT) == attempt
    ]


def find(deployment: Object, pods: list[Object]) -> Trouble | None:
    """The first trouble of a Deployment and its present pods; None: they may be on their way.

    Args:
        deployment: as the API has it.
        pods: as `present` gives them.
    """
    found = [*_refused(deployment), *(trouble for pod in pods for trouble in _of_pod(pod))]
    return next((one for one in found if one.is_lasting), found[0] if found else None)


def _refused(deployment: Object) -> Iterator[Trouble]:
    for condition in deployment.get("status", {}).get("conditions", []):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            yield Trouble(f"its pods are refused: {condition.get('message', condition.get('reason'))}")


def _of_pod(pod: Object) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if status.get("phase") == "Failed":
        yield Trouble(f"its pod has failed: {status.get('reason', '')} {status.get('message', '')}".strip(), name)
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield Trouble(f"no node takes its pod: {condition.get('message', '')}", name, is_lasting=False)
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        yield from _of_container(name, container)


def _of_container(pod: str, container: Object) -> Iterator[Trouble]:
    name, state = container["name"], container.get("state", {})
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated")
    if ended is not None and (name != FETCH or ended["exitCode"] != 0):
        yield Trouble(f"container {name} {ending(ended)}", pod, name, is_restarted="terminated" not in state)
    waiting = state.get("waiting", {})
    if waiting.get("reason") in _BLOCKED:
        yield Trouble(f"container {name} cannot start: {waiting['reason']}: {waiting.get('message', '')}", pod)


def ending(ended: Object) -> str:
    """How a container ended, in words.

    Args:
        ended: its state `terminated`.
    """
    if ended.get("reason") == "OOMKilled":
        return "was killed: it took more memory than its limit (OOMKilled)"
    status = int(ended["exitCode"])
    return f"was ended by signal {status - 128}" if status > 128 else f"ended with exit status {status}"


def stage(pods: list[Object]) -> str:
    """How far the pod that is furthest behind has come, in words."""
    if not pods:
        return "waits for its pod"
    words = ("waits for a node", "fetches image and bundle", "starts", "is ready")
    return words[min(_step(pod.get("status", {})) for pod in pods)]


def _step(status: dict[str, Any]) -> int:
    holds = {condition["type"] for condition in status.get("conditions", []) if condition["status"] == "True"}
    if "PodScheduled" not in holds:
        return 0
    if "Initialized" not in holds:
        return 1
    return 3 if "Ready" in holds else 2


def restarts(pods: list[Object]) -> int:
    """How often the containers of these pods were started again."""
    return sum(one["restartCount"] for pod in pods for one in pod.get("status", {}).get("containerStatuses", []))
