from __future__ import annotations

import copy
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml
from botocore.exceptions import ClientError
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from flowsentry.errors import StackError
from stacks import bootstrap, services
from stacks.site import Site
from tests.conftest import Cluster
from tests.stacks.manifests import Document, alert_tests, documents, write_overlay

ROOT = Path(__file__).parents[2]
HERE = "http://192.0.2.1"
PLACE = Site(
    context="somewhere",
    namespace="elsewhere",
    host="192.0.2.1",
    registry="registry.example.org",
    tag="1",
    zenml_url=f"{HERE}:31080",
    s3_url="https://s3.example.org",
    mlflow_url=f"{HERE}:31050/base",
    serving_url=f"{HERE}:31033",
)


def adapted(overlay: str = "quickstart", **given: Any) -> dict[tuple[str, str], Document]:
    place = given.pop("place", PLACE)
    told = {"pod_networks": [], "api_servers": []} | given
    changed = services.adapt(copy.deepcopy(documents(overlay)), place, **told)
    return {(each["kind"], each["metadata"]["name"]): each for each in changed}


def test_everything_moves_to_the_site_s_namespace() -> None:
    found = adapted()
    assert ("Namespace", "elsewhere") in found
    assert ("Namespace", "flowsentry") not in found
    assert {each["metadata"]["namespace"] for (kind, _), each in found.items() if kind != "Namespace"} == {"elsewhere"}
    subjects = [subject for each in found.values() for subject in each.get("subjects", ())]
    assert {subject["namespace"] for subject in subjects} == {"elsewhere"}


def test_node_ports_are_those_of_the_site_s_addresses() -> None:
    found = adapted()
    ports = {
        name: each["spec"]["ports"][0].get("nodePort") for (kind, name), each in found.items() if kind == "Service"
    }
    assert ports["zenml"] == 31080
    assert ports["mlflow"] == 31050
    assert ports["s3"] == 30070  # its address is not a node port
    assert (ports["champion"], ports["challenger"]) == (31033, 31034)
    assert ports["prometheus"] is None


def test_policies_know_the_cluster_s_own_addresses() -> None:
    found = adapted(
        pod_networks=["10.8.0.0/24", "10.8.1.0/24"], api_servers=[("192.0.2.9", 6443), ("192.0.2.10", 6443)]
    )
    blocks = [
        peer["ipBlock"]
        for (kind, _), each in found.items()
        if kind == "NetworkPolicy"
        for rule in each["spec"].get("ingress", ())
        for peer in rule["from"]
        if "ipBlock" in peer
    ]
    assert len(blocks) >= 4
    assert all(block["except"] == ["10.8.0.0/24", "10.8.1.0/24"] for block in blocks)
    (first, second) = found["NetworkPolicy", "api-server"]["spec"]["egress"]
    assert first == {"to": [{"ipBlock": {"cidr": "192.0.2.9/32"}}], "ports": [{"port": 6443}]}
    assert second["to"] == [{"ipBlock": {"cidr": "192.0.2.10/32"}}]


def test_policies_stay_as_they_are_where_the_cluster_does_not_tell() -> None:
    assert adapted()["NetworkPolicy", "api-server"]["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
    zenml = adapted()["NetworkPolicy", "zenml"]
    assert zenml["spec"]["ingress"][0]["from"][1]["ipBlock"]["except"] == ["10.244.0.0/16"]


def test_a_site_s_own_services_are_reached_at_their_ports() -> None:
    found = adapted("existing")
    ports = found["NetworkPolicy", "pipelines-to-site"]["spec"]["egress"][0]["ports"]
    assert ports == [{"port": 443}, {"port": 31050}, {"port": 31080}]
    assert found["NetworkPolicy", "serving-to-site"]["spec"]["egress"][0]["ports"] == [{"port": 443}]


def test_mlflow_answers_under_the_site_s_name_for_it() -> None:
    container = adapted()["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"][0]
    (hosts,) = [each["value"] for each in container["env"] if each["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert hosts.endswith(",192.0.2.1:31050")
    assert "*" not in hosts.split(",")


SERVICES = {"zenml", "mlflow", "s3", "grafana"}


def test_secrets_are_long_and_never_the_same() -> None:
    one, other = ({name: make() for name, make in services.secret_makers(SERVICES, {}).items()} for _ in range(2))
    assert one.keys() == {"s3", "zenml-server", "mlflow", "serving", "pipelines", "grafana"}
    secret = {
        "s3": {"ROOT_SECRET_KEY"},
        "zenml-server": {
            *("ZENML_DEFAULT_USER_PASSWORD", "ZENML_SERVER_JWT_SECRET_KEY", "ZENML_SECRETS_STORE_ENCRYPTION_KEY"),
        },
        "mlflow": {"password", "secret_key", "basic_auth.ini"},
        "serving": {"token", "AWS_SECRET_ACCESS_KEY"},
        "pipelines": {"AWS_SECRET_ACCESS_KEY"},
        "grafana": {"admin-password"},
    }
    values = [of[name][key] for of in (one, other) for name, keys in secret.items() for key in keys]
    assert len(set(values)) == len(values)
    assert all(len(value) >= 40 for value in values)
    assert one["mlflow"]["password"] in one["mlflow"]["basic_auth.ini"]
    assert one["serving"]["AWS_ACCESS_KEY_ID"] != one["pipelines"]["AWS_ACCESS_KEY_ID"]


def test_secrets_of_services_that_are_there_come_from_the_environment() -> None:
    names = (
        *("ZENML_STORE_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    )
    environment = {name: f"my {name}" for name in names}
    made = {name: make() for name, make in services.secret_makers(set(), environment).items()}
    assert made["flowsentry-client"] == {"zenml_api_key": "my ZENML_STORE_API_KEY"}
    assert made["mlflow"] == {"username": "my MLFLOW_TRACKING_USERNAME", "password": "my MLFLOW_TRACKING_PASSWORD"}
    assert made["pipelines"]["AWS_SECRET_ACCESS_KEY"] == "my AWS_SECRET_ACCESS_KEY"
    assert len(made["serving"]["token"]) >= 40
    for name in names:
        less = {key: value for key, value in environment.items() if key != name}
        with pytest.raises(StackError, match=f"set {name}:"):
            for make in services.secret_makers(set(), less).values():
                make()


def test_an_overlay_that_is_not_there_is_named() -> None:
    with pytest.raises(StackError, match=r"overlay quickstrat: quickstrat/kustomization\.yaml does not exist"):
        services.render("quickstrat")


def test_without_a_tool_that_builds_the_manifests_it_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match="neither kubectl nor kustomize is on PATH"):
        services.render("quickstart")


def test_services_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "PATIENCE_SECONDS", 0.0)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(StackError, match=f"ZenML at {url} does not answer"):
            bootstrap.ZenML(url).accepts("ZENKEY_x")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stacks.services", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def site(context: str, namespace: str, host: str = "127.0.0.1") -> dict[str, str]:
    given = {"CONTEXT": context, "NAMESPACE": namespace, "HOST": host, "REGISTRY": "registry.example.org", "TAG": "1"}
    return {f"FLOWSENTRY_SITE_{key}": value for key, value in given.items()}


def test_a_cluster_that_does_not_answer_or_is_not_known_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{busy.getsockname()[1]}"}}],
            "users": [{"name": "u", "user": {"token": "x"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(kubeconfig), encoding="utf-8")
        for context, told in (("c", "does not answer at https://127.0.0.1"), ("d", "context d cannot be used")):
            done = run(KUBECONFIG=str(tmp_path / "config"), **site(context, "x"))
            assert done.returncode == 1
            assert done.stderr.startswith("error: ")
            assert told in done.stderr
            assert done.stderr.count("\n") == 1


@dataclass(frozen=True)
class Installed:
    """The services in a namespace of their own."""

    namespace: str
    environment: dict[str, str]
    overlay: Path
    told: str
    """By the first run."""

    @property
    def core(self) -> client.CoreV1Api:
        """To look into the namespace."""
        return client.CoreV1Api(config.new_client_from_config())

    def url(self, name: str) -> str:
        """Of a service."""
        return self.environment[f"FLOWSENTRY_SITE_{name.upper()}_URL"]

    def secret(self, name: str) -> dict[str, str]:
        """Values of a Secret."""
        values = services.Cluster(config.new_client_from_config(), self.namespace).secret(name)
        assert values is not None
        return values

    def again(self) -> str:
        """Run the command once more."""
        done = run("--overlay", str(self.overlay), **self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


def free_node_ports(core: client.CoreV1Api, count: int) -> int:
    """First of so many that are free."""
    services_there = core.list_service_for_all_namespaces().items
    used = {port.node_port for each in services_there for port in each.spec.ports or ()}
    while True:
        first = secrets.choice(services.NODE_PORTS[:-count])
        if not used & set(range(first, first + count)):
            return first


@pytest.fixture(scope="module")
def installed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    context = config.list_kube_config_contexts()[1]["name"]
    namespace = f"flowsentry-services-{secrets.token_hex(3)}"
    first = free_node_ports(client.CoreV1Api(config.new_client_from_config()), 5)
    ports = {"ZENML": first, "S3": first + 1, "MLFLOW": first + 2, "SERVING": first + 3}
    environment = site(context, namespace, cluster.host) | {
        f"FLOWSENTRY_SITE_{name}_URL": f"http://{cluster.host}:{port}" for name, port in ports.items()
    }
    overlay = write_overlay(tmp_path_factory.mktemp("overlay"))
    try:
        done = run("--overlay", str(overlay), **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Installed(namespace, environment, overlay, done.stdout)
    finally:
        done = run("--delete", "--yes", **environment)
    assert done.returncode == 0, done.stderr
    assert f"namespace {namespace} is gone" in done.stdout


@pytest.mark.cluster
@pytest.mark.slow
def test_services_become_ready_and_hold_what_a_run_needs(installed: Installed) -> None:
    for name in ("zenml", "mlflow", "s3", "prometheus"):
        assert re.search(rf"{name} is ready \(\d+ s\)", installed.told)
        if name != "prometheus":
            assert httpx.get(f"{installed.url(name)}/health").is_success
    zenml = bootstrap.ZenML(installed.url("zenml"))
    assert zenml.accepts(installed.secret("flowsentry-client")["zenml_api_key"])
    assert not zenml.accepts("ZENKEY_" + secrets.token_hex(20))
    mlflow = installed.secret("mlflow")
    ask = f"{installed.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(ask).status_code == 401
    assert httpx.get(ask, auth=(mlflow["username"], mlflow["password"])).is_success


def store(installed: Installed, secret: str) -> Any:
    keys = installed.secret(secret)
    return boto3.client(
        "s3",
        endpoint_url=installed.url("s3"),
        region_name=bootstrap.REGION,
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_accounts_of_the_store_reach_their_buckets_only(installed: Installed) -> None:
    with closing(store(installed, "pipelines")) as pipelines, closing(store(installed, "serving")) as serving:
        for who, bucket in ((pipelines, "zenml"), (pipelines, "flowsentry"), (serving, "flowsentry")):
            who.put_object(Bucket=bucket, Key="a/b", Body=b"content")
            with closing(who.get_object(Bucket=bucket, Key="a/b")["Body"]) as body:
                assert body.read() == b"content"
            assert who.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
        pipelines.put_object(Bucket="zenml", Key="c", Body=b"")
        for refused in (
            lambda: serving.get_object(Bucket="zenml", Key="c"),
            lambda: serving.put_object(Bucket="zenml", Key="c", Body=b"other"),
            lambda: serving.delete_object(Bucket="zenml", Key="c"),
            lambda: serving.list_objects_v2(Bucket="zenml"),
            lambda: pipelines.delete_bucket(Bucket="zenml"),
            lambda: pipelines.delete_bucket_policy(Bucket="zenml"),
        ):
            with pytest.raises(ClientError, match="AccessDenied"):
                refused()
        serving.delete_objects(Bucket="zenml", Delete={"Objects": [{"Key": "c"}]})
        assert pipelines.list_objects_v2(Bucket="zenml")["KeyCount"] == 2


@pytest.mark.cluster
@pytest.mark.slow
def test_a_second_run_changes_nothing(installed: Installed) -> None:
    names = ("s3", "zenml-server", "mlflow", "serving", "pipelines", "flowsentry-client")
    before = {name: installed.secret(name) for name in names}
    started = {pod.metadata.uid for pod in installed.core.list_namespaced_pod(installed.namespace).items}
    told = installed.again()
    assert not re.search("made|changed|gave", told)
    assert {name: installed.secret(name) for name in names} == before
    assert {pod.metadata.uid for pod in installed.core.list_namespaced_pod(installed.namespace).items} == started


@pytest.mark.cluster
@pytest.mark.slow
def test_a_second_run_repairs_what_was_changed_and_leaves_the_champion(installed: Installed) -> None:
    core = installed.core
    leads = {"spec": {"selector": {"app": "flowsentry-serving", "flowsentry/digest": "0123456789ab"}}}
    core.patch_namespaced_service("champion", installed.namespace, leads)
    core.delete_namespaced_secret("flowsentry-client", installed.namespace)
    client.NetworkingV1Api(core.api_client).delete_namespaced_network_policy("default-deny", installed.namespace)
    told = installed.again()
    assert "made NetworkPolicy default-deny" in told
    assert "made Secret flowsentry-client" in told
    assert bootstrap.ZenML(installed.url("zenml")).accepts(installed.secret("flowsentry-client")["zenml_api_key"])
    selector = core.read_namespaced_service("champion", installed.namespace).spec.selector
    assert selector == leads["spec"]["selector"]


PROBE = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError:
        print(target, "refused")
    else:
        print(target, "reached")
"""


def probe(core: client.CoreV1Api, namespace: str, labels: dict[str, str], targets: list[str]) -> str:
    """What a pod says of addresses that it tries."""
    hardened = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    name = f"probe-{secrets.token_hex(3)}"
    pod = {
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "probe",
                    "image": "zenmldocker/zenml-server:0.98.0",
                    "command": ["python", "-c", PROBE, *targets],
                    "securityContext": hardened,
                }
            ],
        },
    }
    core.create_namespaced_pod(namespace, pod)
    for _ in range(120):
        if core.read_namespaced_pod(name, namespace).status.phase in ("Succeeded", "Failed"):
            break
        time.sleep(0.5)
    told: str = core.read_namespaced_pod_log(name, namespace)
    core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)
    return told


@pytest.mark.cluster
@pytest.mark.slow
def test_pods_of_a_run_reach_the_services_and_those_of_another_namespace_do_not(installed: Installed) -> None:
    core = installed.core
    names = [f"{name}.{installed.namespace}:{port}" for name, port in (("zenml", 8080), ("s3", 7070), ("mlflow", 5000))]
    nodes = [urllib.parse.urlsplit(installed.url(name)).netloc for name in ("zenml", "s3", "mlflow")]
    step = {"app.kubernetes.io/part-of": "flowsentry", "flowsentry/pod": "step"}
    told = probe(core, installed.namespace, step, [*names, *nodes])
    assert told.count("reached") == 6, told
    assert probe(core, installed.namespace, {}, names).count("refused") == 3
    other = f"{installed.namespace}-other"
    core.create_namespace({"metadata": {"name": other}})
    try:
        told = probe(core, other, step, [*names, *nodes])
        assert told.count("refused") == 6, told
    finally:
        core.delete_namespace(other)


@pytest.mark.cluster
@pytest.mark.slow
def test_accounts_may_do_what_they_must_and_no_more(installed: Installed) -> None:
    review = client.AuthorizationV1Api(installed.core.api_client)

    def may(account: str, verb: str, resource: str, group: str = "", name: str = "") -> bool:
        attributes = {
            "namespace": installed.namespace,
            "verb": verb,
            "resource": resource,
            "group": group,
            "name": name,
        }
        user = f"system:serviceaccount:{installed.namespace}:{account}"
        body = {"spec": {"user": user, "resourceAttributes": attributes}}
        return bool(review.create_subject_access_review(body).status.allowed)

    for account in ("step", "serving"):
        for resource in ("secrets", "pods", "configmaps"):
            assert not may(account, "list", resource)
            assert not may(account, "get", resource)
    for account in ("orchestrator", "deployer", "prometheus"):
        assert not may(account, "list", "secrets")
        assert not may(account, "get", "secrets", name="s3")
        assert not may(account, "create", "pods")
        assert not may(account, "create", "rolebindings", "rbac.authorization.k8s.io")
    assert may("orchestrator", "create", "jobs", "batch")
    assert may("deployer", "get", "secrets", name="serving")
    assert may("deployer", "create", "deployments", "apps")
    assert may("deployer", "patch", "services", name="champion")
    assert not may("deployer", "patch", "services", name="zenml")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_pod_that_wants_more_is_not_let_in(installed: Installed) -> None:
    pod = {
        "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "root", "image": "versity/versitygw:v1.8.0"}]},
    }
    with pytest.raises(ApiException, match="violates PodSecurity"):
        installed.core.create_namespaced_pod(installed.namespace, pod)


SERVICE = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(b"flowsentry_flows_total 7\\n" if self.path == "/metrics" else b"\\n")
HTTPServer(("", 3000), Handler).serve_forever()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_prometheus_reads_the_champion_and_knows_the_alerts(installed: Installed) -> None:
    core = installed.core
    labels = {"app": "flowsentry-serving", "flowsentry/digest": "feedfeedfeed"}
    pod = {
        "metadata": {"name": "champion", "labels": labels},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "serving",
                    "image": "zenmldocker/zenml-server:0.98.0",
                    "command": ["python", "-c", SERVICE],
                    "ports": [{"name": "http", "containerPort": 3000}],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    core.create_namespaced_pod(installed.namespace, pod)
    core.patch_namespaced_service("champion", installed.namespace, {"spec": {"selector": labels}})

    def ask(path: str, **query: str) -> Any:
        """Through the API server, as `kubectl port-forward` would."""
        got = core.api_client.call_api(
            f"/api/v1/namespaces/{installed.namespace}/services/prometheus:9090/proxy/api/v1/{path}",
            "GET",
            query_params=list(query.items()),
            auth_settings=["BearerToken"],
            _preload_content=False,
        )[0]
        return json.loads(got.data)["data"]

    found = []
    for _ in range(60):
        if found := ask("query", query='flowsentry_flows_total{role="champion"}')["result"]:
            break
        time.sleep(1)
    assert [each["value"][1] for each in found] == ["7"]
    ready = ask("query", query='up{job="serving-ready", role="champion"}')["result"]
    assert [each["value"][1] for each in ready] == ["1"]
    rules = {rule["name"]: rule for group in ask("rules")["groups"] for rule in group["rules"]}
    assert rules.keys() >= {"ChampionDown", "AlarmRateJumped", "ChampionWithoutTraffic"}
    assert {rule["health"] for rule in rules.values()} <= {"ok", "unknown"}
    core.delete_namespaced_pod("champion", installed.namespace, grace_period_seconds=0)


@pytest.mark.cluster
@pytest.mark.slow
def test_alerts_fire_when_they_should(installed: Installed) -> None:
    context = installed.environment["FLOWSENTRY_SITE_CONTEXT"]
    command = "cat >/prometheus/fires.yml && TMPDIR=/prometheus promtool test rules /prometheus/fires.yml"
    done = subprocess.run(
        [
            *("kubectl", "--context", context, "-n", installed.namespace),
            *("exec", "-i", "deployment/prometheus", "--", "sh", "-c", command),
        ],
        input=alert_tests("/etc/prometheus/alerts.yml"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_a_namespace_of_others_is_neither_taken_nor_deleted(installed: Installed) -> None:
    environment = installed.environment | {"FLOWSENTRY_SITE_NAMESPACE": "default"}
    for arguments in ((), ("--delete", "--yes")):
        done = run("--overlay", str(installed.overlay), *arguments, **environment)
        assert done.returncode == 1
        assert "namespace default was not made by this command" in done.stderr
