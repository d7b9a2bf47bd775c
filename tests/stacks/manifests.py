"""The manifests as tests read them, without a tool; and the overlay for clusters that tests run on."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "stacks" / "kubernetes"
OVERLAYS = ("quickstart", "existing")

Document = dict[str, Any]


@functools.cache
def documents(overlay: str) -> list[Document]:
    """The objects of an overlay; a generated ConfigMap has its plain name."""
    return list(_of(KUBERNETES / "overlays" / overlay))


def _of(folder: Path) -> Iterator[Document]:
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert wanted.keys() <= {"apiVersion", "kind", "resources", "configMapGenerator"}, f"{folder}: teach this function"
    for name in wanted["resources"]:
        path = folder / name
        if path.is_dir():
            yield from _of(path)
        else:
            yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for generated in wanted.get("configMapGenerator", ()):
        files = [folder / name for name in generated["files"]]
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {key: generated[key] for key in ("name", "namespace")} | generated["options"],
            "data": {file.name: file.read_text(encoding="utf-8") for file in files},
        }


def write_overlay(folder: Path) -> Path:
    """An overlay with everything that such a cluster has an image for, and nothing that outlives its pods.

    Its Prometheus is an old one of Debian, which cannot find pods: it asks the Services instead.
    """
    config = yaml.safe_load((KUBERNETES / "monitoring" / "config" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    for job in config["scrape_configs"]:
        del job["kubernetes_sd_configs"]
        job["static_configs"] = [
            {
                "targets": [f"{role}:3000"],
                "labels": {"__meta_kubernetes_service_name": role, "__meta_kubernetes_pod_name": f"of-{role}"},
            }
            for role in ("champion", "challenger")
        ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(KUBERNETES / "monitoring" / "config" / "alerts.yml", folder)
    bases = [os.path.relpath(KUBERNETES / name, folder.resolve()) for name in ("base", "services", "monitoring")]
    claims = ("zenml", "s3", "mlflow", "prometheus")
    patches = [
        {"patch": yaml.safe_dump({"$patch": "delete", "apiVersion": "v1", "kind": kind, "metadata": named})}
        for kind, named in [("PersistentVolumeClaim", {"name": name, "namespace": "flowsentry"}) for name in claims]
    ] + [
        {
            "target": {"kind": "Deployment", "name": name},
            "patch": yaml.safe_dump([{"op": "replace", "path": "/spec/template/spec/volumes/0", "value": EMPTY}]),
        }
        for name in claims
    ]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": bases,
        "images": [{"name": "prom/prometheus", "newTag": "v2.42.0"}],
        "configMapGenerator": [
            {
                "name": "prometheus",
                "namespace": "flowsentry",
                "behavior": "replace",
                "files": ["prometheus.yml", "alerts.yml"],
            }
        ],
        "patches": patches,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return folder


EMPTY = {"name": "data", "emptyDir": {}}


def alert_tests(rules: str) -> str:
    """What promtool is to find out about the alerts: which fire when, and that a quiet day has none.

    `rules` is the path of their file.
    """
    up = 'up{job="serving", role="champion", pod="a"}'
    ready = 'up{job="serving-ready", role="champion", pod="a"}'
    flows = 'flowsentry_flows_total{role="champion"}'
    benign, malicious = (f'flowsentry_verdicts_total{{role="champion", label="{x}"}}' for x in ("benign", "malicious"))
    requests = 'flowsentry_requests_total{role="champion", status="%s"}'
    bucket = 'flowsentry_request_seconds_bucket{role="champion", le="%s"}'
    quiet = {
        up: "1x2000",
        ready: "1x2000",
        flows: "0+600x2000",
        benign: "0+597x2000",
        malicious: "0+3x2000",
        requests % "200": "0+60x2000",
        bucket % "0.05": "0+59.9x2000",
        bucket % "1.0": "0+60x2000",
        bucket % "+Inf": "0+60x2000",
    }
    # what differs from a quiet day, the minute to look, and what fires then
    cases: list[tuple[dict[str, str], int, list[str]]] = [
        ({}, 1900, []),
        ({malicious: "0+3x1500 4500+6x500"}, 1520, []),
        ({up: "1x100 0x500"}, 110, ["ChampionDown", "ChampionGone"]),
        ({up: "1x100 _x500", ready: "1x100 _x500", flows: "0+600x100 _x500"}, 110, ["ChampionGone"]),
        ({up: "1x100 _x500", ready: "1x100 _x500", flows: "0+600x100 _x500"}, 200, []),
        ({ready: "1x100 0x500"}, 110, ["ServiceNotReady"]),
        ({flows: "0+600x100 60000x500"}, 140, ["ChampionWithoutTraffic"]),
        ({malicious: "0+3x1500 4500+200x500"}, 1530, ["AlarmRateJumped"]),
        ({bucket % "0.05": "0+59x2000"}, 100, ["SlowVerdicts"]),
        ({requests % "503": "0+0x100 0+6x500"}, 120, ["RequestsFail"]),
        ({'flowsentry_rejected_flows_total{role="champion", reason="x"}': "0+60x2000"}, 100, ["FlowsRejected"]),
        ({'flowsentry_checkpoint_failures_total{role="champion", pod="a"}': "0+1x2000"}, 100, ["CheckpointsFail"]),
        (
            {'kube_deployment_status_replicas_available{deployment="zenml"}': "1x100 0x500"},
            110,
            ["ClusterServiceDown"],
        ),
        (
            {'kube_job_status_failed{job="kubernetes", job_name="b"}': "1x2000"},
            100,
            ["RunFailed"],
        ),
        (
            {
                'kube_job_status_failed{job="kubernetes", job_name="b"}': "1x2000",
                'kube_job_status_succeeded{job="kubernetes", job_name="b"}': "1x2000",
            },
            100,
            [],
        ),
        (
            {'kube_pod_container_status_terminated_reason{pod="b", container="main", reason="OOMKilled"}': "1x2000"},
            100,
            ["OutOfMemory"],
        ),
    ]
    tests = [
        {
            "name": f"{minute} {fires}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in (quiet | changed).items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fires],
                }
            ],
        }
        for changed, minute, fires in cases
    ]
    return json.dumps({"rule_files": [rules], "evaluation_interval": "1m", "tests": tests})
