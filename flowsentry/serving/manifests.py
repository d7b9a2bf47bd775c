"""What a deployed bundle is on Kubernetes, as plain objects of its API. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flowsentry import telemetry
from flowsentry.serving import drain
from flowsentry.serving.deployer import Deployed

Object = dict[str, Any]
"""An object of the Kubernetes API, or a part of one."""

APP: Final = "flowsentry-serving"
DIGEST: Final = "flowsentry/digest"
MODEL_VERSION: Final = "flowsentry/model-version"
ROLE: Final = "flowsentry/role"
"""Label of Deployments: champion, challenger or previous. Not of pods, which outlive their role."""
ATTEMPT: Final = "flowsentry/attempt"
"""Label of pods: which start of a challenger they belong to."""
SECRET: Final = "serving"
CONTAINER: Final = "serving"
FETCH: Final = "fetch"
NOBODY: Final = "none"
"""Digest that no pod has: a Service that selects it leads nowhere."""

REQUESTS: Final = {"cpu": "200m", "memory": "512Mi", "ephemeral-storage": "256Mi"}
LIMITS: Final = {"cpu": "2", "memory": "1Gi", "ephemeral-storage": "2Gi"}
STREAMS_BYTES: Final = 384 << 20
"""Of the memory, for all streams of a pod; interpreter, model and requests take the rest."""
_BUNDLES: Final = "/bundles"
_TOKEN: Final = "/run/flowsentry"
_GRACE_SECONDS: Final = int(2 * drain.SECONDS) + 33
"""For draining, requests under way and the last checkpoints."""
_HARDENED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class Shape:
    """What the pods of all versions have in common."""

    image: str
    bucket_url: str
    """`s3://bucket` or `s3://bucket/prefix`, of bundles and checkpoints."""
    s3_url: str | None = None
    """Address of the object store; None: the client's own."""
    region: str = "us-east-1"
    replicas: int = 1
    """Of the champion."""
    most_replicas: int | None = None
    """Up to which the champion grows under load; None: it does not."""


def short(digest: str) -> str:
    """The part of a digest that names things."""
    return digest[:12]


def name(digest: str) -> str:
    """Of the Deployment of a bundle, and of what belongs to it."""
    return f"flowsentry-{short(digest)}"


def archive(shape: Shape, digest: str) -> str:
    """URL of a bundle's archive."""
    return f"{shape.bucket_url}/bundles/{digest}.tar.gz"


def selector(digest: str) -> dict[str, str]:
    """Labels of a bundle's pods, and of no others."""
    return {"app": APP, DIGEST: short(digest)}


def deployment(shape: Shape, deployed: Deployed, *, replicas: int, attempt: str) -> Object:
    """The Deployment of a bundle."""
    labels = selector(deployed.digest)
    described = labels | {MODEL_VERSION: deployed.model_version}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name(deployed.digest), "labels": described, "annotations": {DIGEST: deployed.digest}},
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 1,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {
                    "labels": described | {ATTEMPT: attempt},
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(drain.PORT),
                        "prometheus.io/path": "/metrics",
                    },
                },
                "spec": _pod(shape, deployed.digest),
            },
        },
    }


def _pod(shape: Shape, digest: str) -> Object:
    folder = f"{_BUNDLES}/{short(digest)}"
    volumes = {"bundles": _BUNDLES, "tmp": "/tmp"}
    mounts = [{"name": volume, "mountPath": path} for volume, path in volumes.items()]
    token = {"name": "token", "mountPath": _TOKEN, "readOnly": True}
    return {
        "serviceAccountName": "serving",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(digest)},
            }
        ],
        "initContainers": [
            {
                "name": FETCH,
                "image": shape.image,
                "command": ["python", "-m", "flowsentry.serving.fetch", archive(shape, digest), digest, folder],
                "env": _environment(shape),
                "resources": {"requests": REQUESTS, "limits": LIMITS},
                "securityContext": _HARDENED,
                "volumeMounts": mounts,
            }
        ],
        "containers": [
            {
                "name": CONTAINER,
                "image": shape.image,
                "command": ["python", "/opt/flowsentry/serve.py", folder],
                "env": [
                    *_environment(shape),
                    {"name": "FLOWSENTRY_SERVICE_STATE", "value": f"{shape.bucket_url}/state"},
                    {"name": "FLOWSENTRY_SERVICE_TOKEN_FILE", "value": f"{_TOKEN}/token"},
                    {"name": "FLOWSENTRY_SERVICE_MEMORY_BYTES", "value": str(STREAMS_BYTES)},
                ],
                "ports": [{"name": "http", "containerPort": drain.PORT}],
                "resources": {"requests": REQUESTS, "limits": LIMITS},
                "securityContext": _HARDENED,
                "volumeMounts": [*mounts, token],
                # a start compiles for some seconds; the deployer, which watches, gives up long before this does
                "startupProbe": _probe("/readyz", every=1, misses=600),
                "readinessProbe": _probe("/readyz", every=2, misses=3),
                "livenessProbe": _probe("/livez", every=5, misses=6),
                "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "flowsentry.serving.drain"]}}},
            }
        ],
        "volumes": [
            {"name": "bundles", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "512Mi"}},
            {
                "name": "token",
                "secret": {"secretName": SECRET, "items": [{"key": "token", "path": "token"}], "defaultMode": 0o440},
            },
        ],
    }


def _environment(shape: Shape) -> list[Object]:
    off: dict[str, str] = {}
    telemetry.disable(off)
    plain = off | {
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "AWS_REGION": shape.region,
        "AWS_DEFAULT_REGION": shape.region,
    }
    if shape.s3_url is not None:
        plain["AWS_ENDPOINT_URL"] = shape.s3_url
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return [
        *({"name": key, "value": value} for key, value in plain.items()),
        # optional: a site may know its pods by other means
        *({"name": key, "valueFrom": {"secretKeyRef": _key(key)}} for key in keys),
    ]


def _key(key: str) -> Object:
    return {"name": SECRET, "key": key, "optional": True}


def _probe(path: str, *, every: int, misses: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": every,
        "timeoutSeconds": 5,
        "failureThreshold": misses,
    }


def disruption_budget(digest: str, owner: Object) -> Object:
    """Of a champion with several replicas: nodes are emptied one pod at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _belonging(digest, owner),
        "spec": {"minAvailable": 1, "selector": {"matchLabels": selector(digest)}},
    }


def autoscaler(shape: Shape, digest: str, owner: Object) -> Object:
    """Of a champion that grows under load; it rests while the Deployment is scaled to none."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _belonging(digest, owner),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name(digest)},
            "minReplicas": shape.replicas,
            "maxReplicas": shape.most_replicas,
            "metrics": [
                {
                    "type": "Resource",
                    # of the request, which is a tenth of the limit: half of a core
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 250}},
                }
            ],
        },
    }


def _belonging(digest: str, owner: Object) -> Object:
    """Metadata of what goes when the Deployment goes."""
    return {
        "name": name(digest),
        "labels": selector(digest),
        "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "Deployment", "name": name(digest), "uid": owner["metadata"]["uid"]}
        ],
    }


def route(digest: str | None) -> Object:
    """Patch of a Service: to the pods of a bundle, or nowhere; a client stays with the pod that it has met."""
    return {
        "spec": {
            "selector": {"app": APP, DIGEST: short(digest) if digest else NOBODY},
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10_800}},
        }
    }
