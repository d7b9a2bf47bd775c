"""Before a run in the cluster: is all there that it needs? Every failed check is one line that says what to do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from kubernetes import client as k8s
from kubernetes.client import ApiException
from kubernetes.utils.quantity import parse_quantity
from urllib3.exceptions import HTTPError

from flowsentry.errors import StackError
from stacks import cluster, site
from stacks.cluster import TIMEOUT_SECONDS
from stacks.site import Site

VERBS: Final[dict[str, tuple[str, ...]]] = {
    # group/resource[/subresource]: what run.py does with it in the namespace
    "/configmaps": ("get", "create", "patch"),
    "/pods": ("get", "list", "create", "delete"),
    "/pods/log": ("get",),
    "/secrets": ("get", "create", "patch", "delete"),
    "/events": ("list",),
    "/services": ("get", "patch"),
    "apps/deployments": ("get", "list", "create", "patch", "delete"),
    "autoscaling/horizontalpodautoscalers": ("create", "patch"),
    "policy/poddisruptionbudgets": ("create", "patch"),
    "batch/cronjobs": ("get", "list", "create", "patch", "delete"),
    "batch/jobs": ("get", "list", "create", "delete"),
}
ACCOUNTS: Final = ("orchestrator", "step", "deployer")
SECRETS: Final = ("s3", "mlflow", "serving", cluster.CLIENT_SECRET)
ZENML_SECRETS: Final = {
    "flowsentry-s3": ("aws_access_key_id", "aws_secret_access_key"),
    "flowsentry-mlflow": ("username", "password"),
}
BUCKETS: Final = ("zenml", "flowsentry")
MEMORY_MIB: Final = 800
"""Largest request of a pod of a run; a test holds it against `cluster_settings`."""

RECORD: Final = "flowsentry-preflight"
"""ConfigMap that remembers when a pod last reached everything."""
FRESH_SECONDS: Final = 3600
POD_SECONDS: Final = 300
"""Longest wait for the pod, whose image may have to be pulled first."""

_MANIFESTS: Final = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)

Problems = list[str]


@dataclass(frozen=True)
class _Checked:
    problems: Problems
    key: str | None = None


def pass_or_raise() -> tuple[Site, Any]:
    """Check the site, and log in to its ZenML server.

    Returns:
        The site and a client of its Kubernetes API.

    Raises:
        ConfigError: the site's file is not as it should be.
        StackError: something is missing; one line for each.
    """
    here = site.load()
    api = cluster.connect(here)
    checked = check(here, api)
    if checked.problems:
        told = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(checked.problems, 1))
        raise StackError(f"the cluster is not ready, nothing was run:\n{told}")
    cluster.log_in(here, checked.key or "")
    return here, api


def log_in() -> tuple[Site, Any]:
    """Log in without any check, for what needs no pods; otherwise as `pass_or_raise`."""
    here = site.load()
    api = cluster.connect(here)
    cluster.log_in(here, cluster.api_key(here, api))
    return here, api


def check(here: Site, api: Any) -> _Checked:
    """All that is wrong; what cannot be checked because of something else that is wrong is left out."""
    try:
        k8s.VersionApi(api).get_code(_request_timeout=TIMEOUT_SECONDS)
    except (ApiException, HTTPError) as error:
        why = error.reason if isinstance(error, ApiException) else cluster.reason(error)
        return _Checked(
            [
                f"Kubernetes API {api.configuration.host}: {why}; is the cluster up, and is context {here.context} of "
                "the kubeconfig right?"
            ]
        )
    checks: list[Callable[[], Iterable[str]]] = [
        lambda: _permissions(here, api),
        lambda: _namespace(here, api),
        lambda: _node(api),
        lambda: _image(here.pipeline_image),
        lambda: _image(here.serving_image),
    ]
    with ThreadPoolExecutor(len(checks) + 1) as pool:
        services = pool.submit(_services, here, api)
        problems = [problem for found in pool.map(lambda one: list(one()), checks) for problem in found]
        key, more = services.result()
    problems += more
    return _Checked(problems or _from_a_pod(here, api), key)


def _permissions(here: Site, api: Any) -> Problems:
    reviews = k8s.AuthorizationV1Api(api)

    def refused(resource: str, verb: str) -> bool:
        group, name, *rest = resource.split("/")
        attributes = k8s.V1ResourceAttributes(
            namespace=here.namespace, group=group, resource=name, subresource=rest[0] if rest else None, verb=verb
        )
        review = k8s.V1SelfSubjectAccessReview(spec=k8s.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
        return not reviews.create_self_subject_access_review(review, _request_timeout=TIMEOUT_SECONDS).status.allowed

    problems = []
    for resource, verbs in VERBS.items():
        missing = [verb for verb in verbs if refused(resource, verb)]
        if missing:
            problems.append(
                f"permissions: context {here.context} may not {', '.join(missing)} {resource.lstrip('/')} in namespace "
                f"{here.namespace}; ask whoever runs the cluster for a Role with these verbs"
            )
    return problems


def _namespace(here: Site, api: Any) -> Problems:
    core = k8s.CoreV1Api(api)
    try:
        core.list_namespaced_pod(here.namespace, limit=1, _request_timeout=TIMEOUT_SECONDS)
        if not core.list_namespace(
            field_selector=f"metadata.name={here.namespace}", _request_timeout=TIMEOUT_SECONDS
        ).items:
            return [
                f"namespace {here.namespace}: does not exist; run make cluster-services, or set another in the site"
            ]
    except ApiException as error:
        if error.status != 403:
            raise
    problems = []
    kinds = (
        ("service account", ACCOUNTS, core.read_namespaced_service_account),
        ("Secret", SECRETS, core.read_namespaced_secret),
    )
    for kind, names, read in kinds:
        for name in names:
            try:
                read(name, here.namespace, _request_timeout=TIMEOUT_SECONDS)
            except ApiException as error:
                if error.status == 404:
                    problems.append(f"{kind} {name}: missing in namespace {here.namespace}; run make cluster-services")
    return problems


def _node(api: Any) -> Problems:
    try:
        nodes = k8s.CoreV1Api(api).list_node(_request_timeout=TIMEOUT_SECONDS).items
    except ApiException:
        return []  # who may not see nodes sees the pod of this check wait instead
    largest = max((int(parse_quantity(node.status.allocatable["memory"])) >> 20 for node in nodes), default=0)
    if largest < MEMORY_MIB:
        return [f"nodes: the largest offers {largest} MiB of memory, a step needs {MEMORY_MIB}; add a larger node"]
    return []


def _image(image: str) -> Problems:
    name, _, tag = image.rpartition(":")
    host, _, path = name.partition("/")
    remedy = "run make images, or set another registry or tag in the site"
    refusal = ""
    for scheme in ("https", "http"):
        request = urllib.request.Request(
            f"{scheme}://{host}/v2/{path}/manifests/{tag}", method="HEAD", headers={"Accept": _MANIFESTS}
        )
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
            return []
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return []  # the registry is there, and pods have credentials of their own
            refusal = "is not in the registry" if error.code == 404 else f"the registry answers {error.code}"
            break
        except (OSError, ValueError) as error:
            refusal = f"registry {host} does not answer: {cluster.reason(error)}"
    return [f"image {image}: {refusal}; {remedy}"]


def _services(here: Site, api: Any) -> tuple[str | None, Problems]:
    """What the services say when they are asked as a run would ask them, and the key of ZenML's."""
    problems = []
    try:
        key = cluster.api_key(here, api)
    except StackError:
        key = None  # told by the check of secrets
    secrets: dict[str, dict[str, str]] = {}
    try:
        found = _json(f"{here.zenml_url}/api/v1/info")["version"]
        if found != (installed := _zenml_version()):
            problems.append(
                f"ZenML server {here.zenml_url}: is version {found}, but {installed} is installed here; use the server "
                f"image zenmldocker/zenml-server:{installed}"
            )
        elif key:
            secrets, more = _zenml_secrets(here, key)
            problems += more
    except _Unreachable as error:
        problems.append(
            f"ZenML server {here.zenml_url}: {error}; is it running (kubectl get pods), is zenml_url right?"
        )
    s3, mlflow = secrets.get("flowsentry-s3"), secrets.get("flowsentry-mlflow")
    return key, [*problems, *_store(here, s3), *_mlflow(here, mlflow)]


def _zenml_version() -> str:
    from importlib.metadata import version  # ZenML itself must not be imported before the login

    return version("zenml")


def _zenml_secrets(here: Site, key: str) -> tuple[dict[str, dict[str, str]], Problems]:
    form = urllib.parse.urlencode({"grant_type": "zenml-api-key", "password": key}).encode()
    try:
        token = _json(f"{here.zenml_url}/api/v1/login", data=form)["access_token"]
    except _Refused:
        return {}, [
            f"ZenML server {here.zenml_url}: refuses the key in Secret {cluster.CLIENT_SECRET}; "
            "run make cluster-services"
        ]
    values, problems = {}, []
    headers = {"Authorization": f"Bearer {token}"}
    for name, keys in ZENML_SECRETS.items():
        listed = _json(f"{here.zenml_url}/api/v1/secrets?name={name}", headers=headers)["items"]
        found = _json(f"{here.zenml_url}/api/v1/secrets/{listed[0]['id']}", headers=headers) if listed else {}
        held = (found.get("body") or {}).get("values") or {}
        if missing := [one for one in keys if not held.get(one)]:
            problems.append(f"ZenML secret {name}: has no {', '.join(missing)}; run make cluster-services")
        else:
            values[name] = held
    return values, problems


def _store(here: Site, secret: dict[str, str] | None) -> Problems:
    where = f"object store {here.s3_url}"
    if secret is None:
        try:
            _get(here.s3_url)
        except _Refused:
            pass
        except _Unreachable as error:
            return [f"{where}: {error}; is it running (kubectl get pods), is s3_url right?"]
        return []
    import botocore.config
    import botocore.exceptions
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=here.s3_url,
        region_name="us-east-1",
        aws_access_key_id=secret["aws_access_key_id"],
        aws_secret_access_key=secret["aws_secret_access_key"],
        config=botocore.config.Config(
            connect_timeout=TIMEOUT_SECONDS, read_timeout=TIMEOUT_SECONDS, retries={"total_max_attempts": 1}
        ),
    )
    problems = []
    for bucket in BUCKETS:
        try:
            client.head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            code = error.response["ResponseMetadata"]["HTTPStatusCode"]
            why = "does not exist" if code == 404 else f"is refused ({code}) with the ZenML secret flowsentry-s3"
            problems.append(f"{where}: bucket {bucket} {why}; run make cluster-services")
        except botocore.exceptions.BotoCoreError as error:
            return [f"{where}: does not answer ({type(error).__name__}); is it running, is s3_url right?"]
    return problems


def _mlflow(here: Site, secret: dict[str, str] | None) -> Problems:
    where = f"MLflow {here.mlflow_url}"
    try:
        if secret is None:
            _get(f"{here.mlflow_url}/health")
        else:
            basic = base64.b64encode(f"{secret['username']}:{secret['password']}".encode()).decode()
            _get(
                f"{here.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1",
                headers={"Authorization": f"Basic {basic}"},
            )
    except _Refused as error:
        return [f"{where}: refuses the ZenML secret flowsentry-mlflow ({error}); run make cluster-services"]
    except _Unreachable as error:
        return [f"{where}: {error}; is it running (kubectl get pods), is mlflow_url right?"]
    return []


class _Unreachable(Exception):
    pass


class _Refused(_Unreachable):
    pass


def _get(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    try:
        request = urllib.request.Request(url, data=data, headers=headers or {})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read(1 << 20)
            return content
    except urllib.error.HTTPError as error:
        kind = _Refused if error.code in (401, 403) else _Unreachable
        raise kind(f"answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise _Unreachable(f"does not answer: {cluster.reason(error)}") from None


def _json(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    try:
        return json.loads(_get(url, data, headers))
    except ValueError:
        raise _Unreachable("answers something that is no JSON") from None


_PROBE: Final = """
import sys, urllib.error, urllib.request
for url in sys.argv[1:]:
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            print(f"UNREACHABLE {url} answers {error.code}")
    except Exception as error:
        print(f"UNREACHABLE {url} {getattr(error, 'reason', error)}")
print("DONE")
"""


def _addresses(here: Site) -> list[str]:
    return [f"{here.zenml_url}/health", here.s3_url, f"{here.mlflow_url}/health"]


def subject(here: Site) -> str:
    """What a pod's success is recorded for: another image or other addresses are checked anew."""
    return hashlib.sha256(json.dumps([here.pipeline_image, *_addresses(here)]).encode()).hexdigest()[:32]


def _from_a_pod(here: Site, api: Any) -> Problems:
    """The same addresses, asked from where steps run; not again within the hour in which it went well."""
    core = k8s.CoreV1Api(api)
    what = subject(here)
    try:
        record = core.read_namespaced_config_map(RECORD, here.namespace, _request_timeout=TIMEOUT_SECONDS).data or {}
    except ApiException:
        record = {}
    if (at := record.get(what, "")).isdecimal() and time.time() - FRESH_SECONDS < int(at) <= time.time():
        return []
    print("checking from a pod that it reaches ZenML, the object store and MLflow", flush=True)
    name = core.create_namespaced_pod(here.namespace, _probe(here)).metadata.name
    try:
        problems = _outcome(core, here, name)
    finally:
        core.delete_namespaced_pod(name, here.namespace, grace_period_seconds=0)
    if not problems:
        body = {"metadata": {"name": RECORD}, "data": {what: str(int(time.time()))}}
        try:
            core.patch_namespaced_config_map(RECORD, here.namespace, body)
        except ApiException:
            core.create_namespaced_config_map(here.namespace, body)
    return problems


def _outcome(core: Any, here: Site, name: str) -> Problems:
    """Waits for the pod. Why it does not start, or what it does not reach."""
    until, waiting = time.monotonic() + POD_SECONDS, "no reason given"
    while time.monotonic() < until:
        status = core.read_namespaced_pod(name, here.namespace, _request_timeout=TIMEOUT_SECONDS).status
        if status.phase in ("Succeeded", "Failed"):
            log = core.read_namespaced_pod_log(name, here.namespace, _request_timeout=TIMEOUT_SECONDS)
            if status.phase == "Failed" or "DONE" not in log:
                return [f"pod of {here.pipeline_image}: fails: {log.strip()[-200:]}; is it the image of make images?"]
            found = re.findall(r"^UNREACHABLE (\S+) (.*)$", log, re.MULTILINE)
            return [
                f"{url} does not answer a pod: {why}; does the address work inside pods, do NetworkPolicies allow it?"
                for url, why in found
            ]
        for condition in status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                waiting = condition.message or condition.reason
        for container in status.container_statuses or []:
            if container.state.waiting and container.state.waiting.reason:
                waiting = f"{container.state.waiting.reason} {container.state.waiting.message or ''}".strip()
                if container.state.waiting.reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
                    return [f"pod of {here.pipeline_image}: {waiting}; can nodes pull from this registry?"]
        time.sleep(0.5)
    return [f"pod of {here.pipeline_image}: did not run within {POD_SECONDS} s: {waiting}; make room for it"]


def _probe(here: Site) -> dict[str, Any]:
    return {
        "metadata": {
            "generateName": "preflight-",
            "labels": {"app.kubernetes.io/part-of": "flowsentry", "flowsentry/pod": "step"},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": POD_SECONDS,
            "serviceAccountName": "step",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": here.pipeline_image,
                    "command": ["python", "-c", _PROBE, *_addresses(here)],
                    "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": 1000,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }
            ],
        },
    }
