"""The stack `cluster`: log in to its ZenML server, and hand pipelines to its pods."""

from __future__ import annotations

import base64
import os
from typing import Any, Final

import kubernetes
from kubernetes.client import ApiException, CoreV1Api
from urllib3.exceptions import HTTPError

from flowsentry.errors import StackError
from stacks.site import Site

NAME: Final = "cluster"
CLIENT_SECRET: Final = "flowsentry-client"
"""Kubernetes Secret with the key that this machine logs in to ZenML with; read when needed, never stored here."""
CLIENT_KEY: Final = "zenml_api_key"
BUCKET_URL: Final = "s3://flowsentry"
"""Of bundles and checkpoints; ZenML's artifacts are in a bucket of their own."""
TIMEOUT_SECONDS: Final = 20


def connect(site: Site) -> Any:
    """A client of the site's Kubernetes API (`kubernetes.client.ApiClient`).

    Raises:
        StackError: there is no such kubeconfig or context.
    """
    try:
        return kubernetes.config.new_client_from_config(context=site.context)
    except kubernetes.config.ConfigException as error:
        told = str(error).rstrip(".")
        raise StackError(
            f"context {site.context}: {told}; set KUBECONFIG, or another context in stacks/site.yaml "
            "(kubectl config get-contexts lists them)"
        ) from None


def api_key(site: Site, api: Any) -> str:
    """The key of this site's ZenML server.

    Raises:
        StackError: it cannot be read.
    """
    where = f"Secret {CLIENT_SECRET} of namespace {site.namespace}"
    try:
        secret = CoreV1Api(api).read_namespaced_secret(CLIENT_SECRET, site.namespace, _request_timeout=TIMEOUT_SECONDS)
    except ApiException as error:
        raise StackError(f"{where} cannot be read: {error.reason}; run make cluster-services") from None
    except HTTPError as error:
        raise StackError(f"{api.configuration.host} does not answer: {reason(error)}; is the cluster up?") from None
    if CLIENT_KEY not in (secret.data or {}):
        raise StackError(f"{where} has no {CLIENT_KEY}; run make cluster-services")
    return base64.b64decode(secret.data[CLIENT_KEY]).decode()


def deployer_environment(site: Site) -> dict[str, str]:
    """What `steps.stages` has to know of where champions are served, here and in pods."""
    return {
        "FLOWSENTRY_DEPLOYER": "kubernetes",
        "FLOWSENTRY_NAMESPACE": site.namespace,
        "FLOWSENTRY_SERVING_IMAGE": site.serving_image,
        "FLOWSENTRY_SERVING_URL": site.serving_url,
        "FLOWSENTRY_S3_URL": site.s3_url,
        "FLOWSENTRY_BUCKET_URL": BUCKET_URL,
    }


def log_in(site: Site, key: str) -> None:
    """Use the site's services in this process alone; has to be called before ZenML is imported."""
    os.environ |= deployer_environment(site)
    os.environ["FLOWSENTRY_CONTEXT"] = site.context
    os.environ["ZENML_STORE_URL"] = site.zenml_url
    os.environ["ZENML_STORE_API_KEY"] = key


def reason(error: Exception) -> str:
    """The innermost cause of a failed request, in a few words."""
    cause: Any = getattr(error, "reason", None) or error.__cause__ or error
    if isinstance(cause, Exception) and cause is not error:
        return reason(cause)
    return str(cause).rsplit(": ", 1)[-1] or type(cause).__name__
