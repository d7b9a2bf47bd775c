"""The manifests as tests read them, without a tool; and the overlay for clusters that tests run on."""

from __future__ import annotations

import functools
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
