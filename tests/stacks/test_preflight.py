from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from flowsentry.errors import StackError
from stacks import cluster, preflight
from stacks.site import Site

KEY = "ZENKEY_of_the_test"


class Everything(BaseHTTPRequestHandler):
    """Kubernetes, a registry, ZenML, an object store and MLflow at one address, with what is wrong with them."""

    server: Stand

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any = None) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length).decode()
        path = urlsplit(self.path).path.rstrip("/")
        self.server.asked.append(f"{self.command} {path}")
        for pattern, status in self.server.wrong.items():
            if re.search(pattern, f"{self.command} {path} {sent}"):
                self._send(status)
                return
        self._send(200 if self.command != "POST" else 201, self._body(path, sent))

    do_GET = do_HEAD = do_POST = do_PATCH = do_DELETE = _handle

    def _body(self, path: str, sent: str) -> Any:
        last = path.rsplit("/", 1)[-1]
        secret = {
            "flowsentry-s3": {"aws_access_key_id": "a", "aws_secret_access_key": "b"},
            "flowsentry-mlflow": {"username": "a", "password": "b"},
        }
        at = time.time() - self.server.age
        match path.removeprefix("/api/v1/").split("/"):
            case ["info"]:
                return {"version": self.server.version}
            case ["login"]:
                return {"access_token": "token"} if KEY in sent else {}
            case ["secrets"]:
                name = urlsplit(self.path).query.removeprefix("name=")
                return {"items": [] if name in self.server.without else [{"id": name}]}
            case ["secrets", name]:
                return {"body": {"values": secret[name]}}
            case ["namespaces"]:
                return {"items": [] if "namespace" in self.server.without else [{"metadata": {"name": "ns"}}]}
            case ["nodes"]:
                return {"items": [{"status": {"allocatable": {"memory": self.server.memory}}}]}
            case ["namespaces", _, "secrets", _]:
                return {"data": {cluster.CLIENT_KEY: base64.b64encode(KEY.encode()).decode()}}
            case ["namespaces", _, "configmaps", _] if self.command == "GET":
                return {"data": {self.server.probed: str(int(at))}}
            case ["namespaces", _, "pods"]:
                return {"metadata": {"name": "preflight-x"}} if self.command == "POST" else {"items": []}
            case ["namespaces", _, "pods", _]:
                return {"metadata": {"name": "preflight-x"}, "status": self.server.pod}
            case ["namespaces", _, "pods", _, "log"]:
                return self.server.log
        if last == "selfsubjectaccessreviews":
            asked = json.loads(sent)["spec"]["resourceAttributes"]
            allowed = f"{asked['verb']} {asked['resource']}" not in self.server.without
            return {"spec": json.loads(sent)["spec"], "status": {"allowed": allowed}}
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.2"} | dict.fromkeys(
            ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform"), "x"
        )


class Stand(ThreadingHTTPServer):
    daemon_threads = True
    wrong: dict[str, int]
    without: set[str]
    asked: list[str]
    version: str
    memory: str
    pod: dict[str, Any]
    log: str
    probed: str
    age: float


@pytest.fixture
def stand() -> Iterator[Stand]:
    """Everything in order, and a pod reached everything a minute ago."""
    server = Stand(("127.0.0.1", 0), Everything)
    server.wrong, server.without, server.asked = {}, set(), []
    server.version, server.memory, server.age = version("zenml"), "4Gi", 60
    server.pod, server.log, server.probed = {"phase": "Succeeded"}, "DONE\n", "-"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def here(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    address = f"127.0.0.1:{stand.server_port}"
    url = f"http://{address}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "test",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    site = Site("test", "ns", "127.0.0.1", address, "1", url, url, url, url)
    monkeypatch.setattr("stacks.site.load", lambda: site)
    stand.probed = preflight.subject(site)
    return site


def problems(here: Site) -> list[str]:
    return preflight.check(here, cluster.connect(here)).problems


def test_a_cluster_in_order_passes_and_logs_in_for_this_process(
    here: Site, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert preflight.pass_or_raise()[0] == here
    assert os.environ["ZENML_STORE_URL"] == here.zenml_url
    assert os.environ["ZENML_STORE_API_KEY"] == KEY
    assert "POST /api/v1/namespaces/ns/pods" not in stand.asked, "a pod reached everything a minute ago"


@pytest.mark.parametrize(
    ("wrong", "without", "expected"),
    [
        ({"/version": 503}, set(), "Kubernetes API http://127.0.0.1:"),
        ({}, {"create pods"}, "permissions: context test may not create pods in namespace ns"),
        ({}, {"delete secrets"}, "permissions: context test may not delete secrets in namespace ns"),
        ({}, {"namespace"}, "namespace ns: does not exist; run make cluster-services"),
        ({"serviceaccounts/deployer": 404}, set(), "service account deployer: missing in namespace ns"),
        ({"namespaces/ns/secrets/serving": 404}, set(), "Secret serving: missing in namespace ns"),
        ({"flowsentry-pipeline/manifests": 404}, set(), "is not in the registry; run make images"),
        ({"flowsentry-serving/manifests": 500}, set(), "the registry answers 500"),
        ({"GET /api/v1/info": 502}, set(), "ZenML server http://127.0.0.1:"),
        ({"POST /api/v1/login": 401}, set(), "refuses the key in Secret flowsentry-client"),
        ({}, {"flowsentry-mlflow"}, "ZenML secret flowsentry-mlflow: has no username, password"),
        ({"HEAD /flowsentry$|HEAD /flowsentry ": 404}, set(), "bucket flowsentry does not exist"),
        ({"HEAD /zenml$|HEAD /zenml ": 403}, set(), "bucket zenml is refused (403)"),
        ({"experiments/search": 401}, set(), "MLflow http://127.0.0.1:"),
        ({"experiments/search": 500}, set(), "answers 500; is it running"),
    ],
)
def test_what_is_missing_is_one_line_that_names_it(
    wrong: dict[str, int], without: set[str], expected: str, here: Site, stand: Stand
) -> None:
    stand.wrong, stand.without = wrong, without
    (line,) = problems(here)
    assert expected in line
    assert "\n" not in line and KEY not in line


def test_everything_that_is_wrong_is_told_at_once(here: Site, stand: Stand) -> None:
    stand.wrong, stand.memory = {"manifests": 404, "experiments/search": 500}, "100Mi"
    with pytest.raises(StackError) as caught:
        preflight.pass_or_raise()
    first, *lines = str(caught.value).splitlines()
    assert first == "the cluster is not ready, nothing was run:"
    assert len(lines) == 4
    assert "nodes: the largest offers 100 MiB of memory" in lines[0]


def test_another_version_of_zenml_is_named(here: Site, stand: Stand) -> None:
    stand.version = "0.90.0"
    (line,) = problems(here)
    assert "is version 0.90.0, but" in line


def test_an_unknown_context_is_named(here: Site) -> None:
    with pytest.raises(StackError, match=r"context other: .*kubectl config get-contexts"):
        cluster.connect(Site("other", *list(vars(here).values())[1:]))


def test_an_old_success_is_checked_again_from_a_pod_which_is_removed(here: Site, stand: Stand) -> None:
    stand.age = preflight.FRESH_SECONDS + 5
    assert problems(here) == []
    assert "POST /api/v1/namespaces/ns/pods" in stand.asked
    assert "DELETE /api/v1/namespaces/ns/pods/preflight-x" in stand.asked
    assert "PATCH /api/v1/namespaces/ns/configmaps/flowsentry-preflight" in stand.asked


@pytest.mark.parametrize(
    ("pod", "log", "expected"),
    [
        (
            {"phase": "Succeeded"},
            "UNREACHABLE http://x/health timed out\nDONE\n",
            "http://x/health does not answer a pod: timed out",
        ),
        ({"phase": "Failed"}, "exec: python: not found", "fails: exec: python: not found"),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {
                        **dict.fromkeys(("image", "imageID", "name"), "x"),
                        "ready": False,
                        "restartCount": 0,
                        "state": {"waiting": {"reason": "ErrImagePull", "message": "no such host"}},
                    }
                ],
            },
            "",
            "ErrImagePull no such host; can nodes pull from this registry?",
        ),
    ],
)
def test_what_a_pod_does_not_reach_is_told_and_not_remembered(
    pod: dict[str, Any], log: str, expected: str, here: Site, stand: Stand
) -> None:
    stand.age, stand.pod, stand.log = preflight.FRESH_SECONDS + 5, pod, log
    (line,) = problems(here)
    assert expected in line
    assert not any(asked.startswith("PATCH") for asked in stand.asked)


def test_the_program_of_the_pod_says_what_it_does_not_reach(stand: Stand) -> None:
    url = f"http://127.0.0.1:{stand.server_port}"
    stand.wrong = {"GET /broken": 500, "GET /refused": 403}
    done = subprocess.run(
        [sys.executable, "-c", preflight._PROBE, f"{url}/x", f"{url}/broken", f"{url}/refused", "http://127.0.0.1:1/"],
        check=True,
        capture_output=True,
        text=True,
    )
    broken, closed, end = done.stdout.splitlines()
    assert broken == f"UNREACHABLE {url}/broken answers 500"
    assert closed.startswith("UNREACHABLE http://127.0.0.1:1/ ")
    assert end == "DONE"
