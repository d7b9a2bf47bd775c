"""A Kubernetes API in memory: objects with versions, pods that are ready at once. For kills at any point."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from flowsentry.serving.kubernetes_api import Conflict, Missing
from flowsentry.serving.manifests import Object


class Killed(BaseException):
    """The deployer's process ends here."""


class Cluster:
    """The objects, as everybody sees them."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.pods: dict[str, Object] = {}
        self._numbers = itertools.count(1)
        for name in ("champion", "challenger"):
            self.add("v1/services", {"metadata": {"name": name}, "spec": {"ports": [{"port": 3000}]}})

    def add(self, kind: str, body: Object) -> Object:
        made = copy.deepcopy(body)
        made["metadata"]["uid"] = f"uid-{next(self._numbers)}"
        self.objects[kind, body["metadata"]["name"]] = made
        return self.touch(made)

    def touch(self, found: Object) -> Object:
        found["metadata"]["resourceVersion"] = str(next(self._numbers))
        return found

    def leads_to(self, service: str) -> str | None:
        return self.objects["v1/services", service]["spec"].get("selector", {}).get("flowsentry/digest")

    def replicas(self) -> dict[str, int]:
        """Wanted pods of each Deployment."""
        return {
            name: found["spec"]["replicas"] for (kind, name), found in self.objects.items() if "deployments" in kind
        }


class StandInApi:
    """One deployer's way to a cluster; it may be killed before or after any change."""

    is_inside = False

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.changes = 0
        self.kill_at = -1
        """Half changes: 0 is before the first one, 1 after it, 2 before the second one."""
        self.on_change: Callable[[str, str], None] = lambda kind, name: None

    def get(self, kind: str, name: str) -> Object:
        if kind == "v1/pods":
            return copy.deepcopy(self._found(self.cluster.pods, name))
        return self._seen(kind, self._found(self.cluster.objects, (kind, name)))

    def list(self, kind: str, **query: str) -> list[Object]:
        if kind == "v1/pods":
            return []
        return [self._seen(kind, found) for (its, _), found in self.cluster.objects.items() if its == kind]

    def create(self, kind: str, body: Object) -> Object:
        with _Change(self, kind, body["metadata"]["name"]):
            if (kind, body["metadata"]["name"]) in self.cluster.objects:
                raise Conflict("there already")
            return self._seen(kind, self.cluster.add(kind, body))

    def patch(self, kind: str, name: str, body: Object) -> Object:
        with _Change(self, kind, name):
            found = self._found(self.cluster.objects, (kind, name))
            version = body.get("metadata", {}).get("resourceVersion")
            if version not in (None, found["metadata"]["resourceVersion"]):
                raise Conflict("changed meanwhile")
            _merge(found, copy.deepcopy(body))
            return self._seen(kind, self.cluster.touch(found))

    def delete(self, kind: str, name: str, uid: str) -> None:
        with _Change(self, kind, name):
            found = self.cluster.objects.get((kind, name))
            if found is not None and found["metadata"]["uid"] == uid:
                del self.cluster.objects[kind, name]

    def log(self, pod: str, container: str, *, previous: bool) -> str:
        return "its last line"

    def _found(self, objects: dict[Any, Object], key: Any) -> Object:
        if key not in objects:
            raise Missing(f"{key} not found")
        return objects[key]

    def _seen(self, kind: str, found: Object) -> Object:
        seen = copy.deepcopy(found)
        if "deployments" in kind:
            wanted = seen["spec"]["replicas"]
            seen["metadata"]["generation"] = 1
            seen["status"] = {
                "observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, "readyReplicas": wanted,
            }  # fmt: skip
        return seen


class _Change:
    """The death of the deployer, around a change."""

    def __init__(self, api: StandInApi, kind: str, name: str) -> None:
        self._api, self._what = api, (kind, name)

    def __enter__(self) -> None:
        self._api.on_change(*self._what)
        self._check()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self._api.changes >= self._api.kill_at >= 0:
            raise Killed
        self._api.changes += 1


def _merge(found: Object, patch: Object) -> None:
    """JSON merge patch."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            _merge(found[key], value)
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = value
