"""Objects of a Kubernetes namespace as plain dictionaries, through the official client."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from flowsentry.errors import DeployError
from flowsentry.serving.manifests import Object

TAIL_LINES: Final = 30
_TIMEOUT: Final = (5, 30)
_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Missing(DeployError):
    """The cluster has no such object."""


class Conflict(DeployError):
    """Somebody else has changed the object meanwhile, or made it."""


class Away(DeployError):
    """The cluster does not answer now."""


class Api:
    """One namespace.

    Every method raises `Missing`, `Conflict`, `Away`, or DeployError if the cluster refuses.
    """

    def __init__(self, namespace: str, context: str | None) -> None:
        """Reads the pod's own account, or the kubeconfig if there is none or a context is named.

        Raises:
            DeployError: neither can be used.
        """
        from kubernetes import client, config

        self.namespace = namespace
        self.is_inside = context is None and "KUBERNETES_SERVICE_HOST" in os.environ and _ACCOUNT.exists()
        settings = client.Configuration()
        try:
            if self.is_inside:
                config.load_incluster_config(client_configuration=settings)
            else:
                # else the client takes what the variable was when it was imported
                file = os.environ.get("KUBECONFIG") or None
                config.load_kube_config(config_file=file, context=context, client_configuration=settings)
        except Exception as error:  # its own, yaml's, OSError
            raise DeployError(f"no Kubernetes cluster is known: {error}; set KUBECONFIG") from error
        settings.retries = 2
        self._client = client.ApiClient(settings)

    def get(self, kind: str, name: str) -> Object:
        """An object.

        Args:
            kind: group and plural as in the API's paths, e.g. `apps/v1/deployments`, `v1/pods`.
            name: of the object.
        """
        return self._json("GET", self._path(kind, name))

    def list(self, kind: str, **query: str) -> list[Object]:
        """Objects that a `labelSelector` or `fieldSelector` chooses."""
        return list(self._json("GET", self._path(kind), query=query)["items"])

    def create(self, kind: str, body: Object) -> Object:
        """Make an object; `Conflict` if there is one of this name."""
        return self._json("POST", self._path(kind), body)

    def patch(self, kind: str, name: str, body: Object) -> Object:
        """Change an object (JSON merge patch); `Conflict` if the patch names another resourceVersion."""
        return self._json("PATCH", self._path(kind, name), body)

    def delete(self, kind: str, name: str, uid: str) -> None:
        """Remove an object and what belongs to it, unless it is gone or another one by now."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        with suppress(Missing, Conflict):
            self._json("DELETE", self._path(kind, name), body)

    def log(self, pod: str, container: str, *, previous: bool) -> str:
        """Last lines that a container has written."""
        query = {"container": container, "tailLines": str(TAIL_LINES), "previous": str(previous).lower()}
        return self._send("GET", self._path("v1/pods", pod) + "/log", None, query).decode("utf-8", "replace").strip()

    def _path(self, kind: str, name: str = "") -> str:
        group, _, plural = kind.rpartition("/")
        root = "/api" if group == "v1" else "/apis"
        return f"{root}/{group}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def _json(self, method: str, path: str, body: Object | None = None, query: dict[str, str] | None = None) -> Object:
        return dict(json.loads(self._send(method, path, body, query or {})))

    def _send(self, method: str, path: str, body: Object | None, query: dict[str, str]) -> bytes:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            answer = self._client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "*/*", "Content-Type": kind},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT,
            )
            if not 200 <= answer.status < 300:
                raise _refusal(answer.status, answer.data)
            return bytes(answer.data)
        except ApiException as error:
            raise _refusal(error.status, error.body) from error
        except (HTTPError, OSError) as error:
            raise Away(f"the Kubernetes cluster does not answer: {error}") from error


def _refusal(status: int, body: bytes | str | None) -> DeployError:
    try:
        said = str(json.loads(body or b"{}").get("message", "")) or f"status {status}"
    except ValueError:
        said = f"status {status}"
    match status:
        case 404:
            return Missing(f"the cluster says: {said}")
        case 409:
            return Conflict(f"the cluster says: {said}")
        case 403:
            return DeployError(f"the cluster does not permit it: {said}")
        case 401:
            return DeployError("the cluster does not know these credentials; renew the kubeconfig")
        case 429 | 500 | 502 | 503 | 504:
            return Away(f"the Kubernetes cluster does not answer as it should: {said}")
        case _:
            return DeployError(f"the cluster refuses it: {said}")
