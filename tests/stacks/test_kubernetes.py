from __future__ import annotations

import json
import re
import shutil
import subprocess
from ipaddress import ip_address, ip_network
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from prometheus_client.parser import text_string_to_metric_families

from flowsentry.serving.metrics import Metrics
from flowsentry.serving.streams import Counters
from stacks import services
from tests.stacks.manifests import KUBERNETES, OVERLAYS, Document, alert_tests, documents

EVERYTHING = [(overlay, document) for overlay in OVERLAYS for document in documents(overlay)]
OBJECTS = [
    pytest.param(document, id=f"{overlay}-{document['kind']}-{document['metadata']['name']}")
    for overlay, document in EVERYTHING
]
DEPLOYMENTS = [each for each in OBJECTS if each.values[0]["kind"] == "Deployment"]
QUICKSTART = documents("quickstart")

GROUPS = {
    "v1": "V1",
    "apps/v1": "V1",
    "networking.k8s.io/v1": "V1",
    "rbac.authorization.k8s.io/v1": "V1",
}


def pod_of(deployment: Document) -> Document:
    pod: Document = deployment["spec"]["template"]["spec"]
    return pod


def named(kind: str, name: str, of: list[Document] = QUICKSTART) -> Document:
    (found,) = [each for each in of if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def check(value: Any, of: str, at: str) -> None:
    """Hold a value against a model of the API: known keys, required keys, types."""
    if of.startswith("list["):
        assert isinstance(value, list), f"{at} should be a list"
        for number, item in enumerate(value):
            check(item, of[5:-1], f"{at}[{number}]")
    elif of.startswith("dict("):
        assert isinstance(value, dict), f"{at} should hold keys"
        for key, item in value.items():
            assert isinstance(key, str)
            check(item, of[5:-1].partition(",")[2].strip(), f"{at}.{key}")
    elif of in ("str", "int", "bool"):
        assert type(value).__name__ == of, f"{at}: {value!r} should be {of}"
    elif of != "object":
        model = getattr(client, of)
        known = {json_key: name for name, json_key in model.attribute_map.items()}
        assert isinstance(value, dict), f"{at} should hold keys"
        assert value.keys() <= known.keys(), f"{at}: {of} has no {sorted(value.keys() - known.keys())}"
        model(**{known[key]: item for key, item in value.items()})  # raises where a required key is missing
        for key, item in value.items():
            check(item, model.openapi_types[known[key]], f"{at}.{key}")


@pytest.mark.parametrize("document", OBJECTS)
def test_every_object_is_one_of_the_api(document: Document) -> None:
    check(document, GROUPS[document["apiVersion"]] + document["kind"], document["kind"])


@pytest.mark.parametrize("broken", [{"replica": 1}, {"replicas": "1"}, {"selector": None}, {"template": []}])
def test_the_check_finds_mistakes(broken: Document) -> None:
    document = json.loads(json.dumps(named("Deployment", "s3")))
    document["spec"] |= broken
    with pytest.raises((AssertionError, ValueError)):
        check(document, "V1Deployment", "Deployment")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same_objects(overlay: str) -> None:
    if not shutil.which("kubectl") and not shutil.which("kustomize"):
        pytest.skip("neither kubectl nor kustomize is on PATH")
    built = {
        (each["kind"], re.sub(r"-[a-z0-9]{10}$", "", each["metadata"]["name"])) for each in services.render(overlay)
    }
    assert built == {(each["kind"], each["metadata"]["name"]) for each in documents(overlay)}


def test_objects_have_a_namespace_and_a_name_of_their_own() -> None:
    for overlay in OVERLAYS:
        names = [(each["kind"], each["metadata"]["name"]) for each in documents(overlay)]
        assert len(names) == len(set(names))
        for each in documents(overlay):
            assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "flowsentry"


def test_a_site_with_services_of_its_own_gets_no_others() -> None:
    assert {each["kind"] for each in documents("existing")} == {
        *("Namespace", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "Service"),
    }
    assert {each["metadata"]["name"] for each in documents("existing") if each["kind"] == "Service"} == {
        "champion",
        "challenger",
    }


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_pods_are_allowed_by_pod_security_restricted(deployment: Document) -> None:
    pod = pod_of(deployment)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0  # an image that names its user by a word is refused otherwise
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for volume in pod.get("volumes", ()):
        assert volume.keys() & {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in container["ports"])


def test_the_namespace_holds_all_pods_to_it() -> None:
    labels = named("Namespace", "flowsentry")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_containers_have_bounds_probes_and_a_version(deployment: Document) -> None:
    for container in pod_of(deployment)["containers"]:
        for key in ("requests", "limits"):
            assert container["resources"][key].keys() >= {"cpu", "memory"}
        ports = {port["name"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports
        image, _, tag = container["image"].rpartition(":")
        assert image
        assert re.fullmatch(r"v?\d+\.\d+\.\d+(-\w+)?", tag)
        assert "imagePullPolicy" not in container


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_pods_get_no_token_unless_they_have_rights_and_no_variables_of_services(deployment: Document) -> None:
    pod = pod_of(deployment)
    assert pod["enableServiceLinks"] is False
    bound = {subject["name"] for each in QUICKSTART if each["kind"] == "RoleBinding" for subject in each["subjects"]}
    assert pod["automountServiceAccountToken"] is (pod.get("serviceAccountName") in bound)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_what_pods_refer_to_is_there(deployment: Document) -> None:
    pod = pod_of(deployment)
    deployed = {each["metadata"]["name"] for each in QUICKSTART if each["kind"] == "Deployment"}
    secrets = {name: set(make()) for name, make in services.secret_makers(deployed, {}).items()}
    mounted = {volume["name"] for volume in pod.get("volumes", ())}
    for volume in pod.get("volumes", ()):
        if claim := volume.get("persistentVolumeClaim"):
            named("PersistentVolumeClaim", claim["claimName"])
        if config := volume.get("configMap"):
            keys = named("ConfigMap", config["name"])["data"].keys()
            assert {item["key"] for item in config.get("items", ())} <= keys
        if secret := volume.get("secret"):
            assert {item["key"] for item in secret["items"]} <= secrets[secret["secretName"]]
    for container in pod["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == mounted
        for source in container.get("envFrom", ()):
            assert all(re.fullmatch(r"[A-Z0-9_]+", key) for key in secrets[source["secretRef"]["name"]])
        for variable in container.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in secrets[reference["name"]]
    if account := pod.get("serviceAccountName"):
        named("ServiceAccount", account)


def test_no_secret_stands_in_a_file() -> None:
    for _, document in EVERYTHING:
        assert document["kind"] != "Secret"
        if document["kind"] == "Deployment":
            for variable in (v for container in pod_of(document)["containers"] for v in container.get("env", ())):
                if re.search("PASSWORD|SECRET|TOKEN|KEY|USER$", variable["name"]):
                    assert "value" not in variable, variable["name"]
    for path in KUBERNETES.rglob("*"):
        if path.is_file():
            assert not re.search(
                r"(?i)(password|secret|token)\s*[:=]\s*[\"']?[a-z0-9+/_-]{8,}", path.read_text("utf-8")
            )


def test_accounts_have_the_rights_they_use_and_no_others() -> None:
    rights: dict[str, set[tuple[str, str, str]]] = {}
    for each in QUICKSTART:
        assert each["kind"] not in ("ClusterRole", "ClusterRoleBinding")
        if each["kind"] == "RoleBinding":
            assert each["roleRef"]["kind"] == "Role"
            (subject,) = each["subjects"]
            named("ServiceAccount", subject["name"])
            assert subject["namespace"] == "flowsentry"
            rights[subject["name"]] = {
                (resource, verb, name)
                for rule in named("Role", each["roleRef"]["name"])["rules"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
                for name in rule.get("resourceNames", ["any"])
            }
    assert rights.keys() == {"orchestrator", "deployer", "prometheus", "kube-state-metrics"}
    assert not any("*" in right for of in rights.values() for right in of)
    of_secrets = {(account, *right) for account, of in rights.items() for right in of if right[0] == "secrets"}
    assert of_secrets == {("orchestrator", "secrets", "delete", "any"), ("deployer", "secrets", "get", "serving")}
    changes = {account for account, of in rights.items() for right in of if right[1] not in ("get", "list", "watch")}
    assert changes == {"orchestrator", "deployer"}


@pytest.mark.parametrize("each", [each for each in OBJECTS if each.values[0]["kind"] == "Service"])
def test_services_lead_to_a_port_of_their_pods(each: Document) -> None:
    name, spec = each["metadata"]["name"], each["spec"]
    if name in ("champion", "challenger"):
        assert "selector" not in spec  # the deployer's: to apply this again must not take it away
        return
    template = named("Deployment", spec["selector"]["app"])["spec"]["template"]
    assert spec["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert [ports[port["targetPort"]] for port in spec["ports"]] == [port["port"] for port in spec["ports"]]


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_deployments_select_their_pods_and_a_volume_has_one_writer(deployment: Document) -> None:
    spec = deployment["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    if any("persistentVolumeClaim" in volume for volume in pod_of(deployment).get("volumes", ())):
        assert spec["replicas"] == 1
        assert spec["strategy"] == {"type": "Recreate"}


STEP = {"app.kubernetes.io/part-of": "flowsentry", "flowsentry/pod": "step"}
ORCHESTRATOR = STEP | {"flowsentry/pod": "orchestrator"}
DEPLOYER = STEP | {"flowsentry/pod": "deployer"}
SERVING = {"app": "flowsentry-serving", "flowsentry/digest": "0123456789ab"}
DNS = {"k8s-app": "kube-dns"}


def app(name: str) -> dict[str, str]:
    labels: dict[str, str] = named("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    return labels


def chosen(selector: Document, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


Peer = dict[str, str] | str
"""Labels of a pod of the namespace; or an address outside it."""


def is_peer(of: Document, peer: Peer) -> bool:
    if block := of.get("ipBlock"):
        if isinstance(peer, dict):
            return False
        address = ip_address(peer)
        inside = any(address in ip_network(part) for part in block.get("except", ()))
        return address in ip_network(block["cidr"]) and not inside
    if namespace := of.get("namespaceSelector"):
        assert namespace == {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}
        return isinstance(peer, dict) and "k8s-app" in peer and chosen(of["podSelector"], peer)
    return isinstance(peer, dict) and "k8s-app" not in peer and chosen(of["podSelector"], peer)


def passes(policies: list[Document], direction: str, pod: Peer, peer: Peer, port: int) -> bool:
    if isinstance(pod, str) or "k8s-app" in pod:
        return True  # not of this namespace
    spoken = [
        spec
        for spec in (policy["spec"] for policy in policies)
        if direction in spec["policyTypes"] and chosen(spec["podSelector"], pod)
    ]
    assert spoken, "default-deny speaks of every pod"
    key, side = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return any(
        any(is_peer(of, peer) for of in rule[side]) and any(allowed["port"] == port for allowed in rule["ports"])
        for spec in spoken
        for rule in spec.get(key, ())
    )


def reaches(source: Peer, target: Peer, port: int, overlay: str = "quickstart") -> bool:
    policies = [each for each in documents(overlay) if each["kind"] == "NetworkPolicy"]
    return passes(policies, "Egress", source, target, port) and passes(policies, "Ingress", target, source, port)


@pytest.mark.parametrize("source", [STEP, ORCHESTRATOR, DEPLOYER], ids=["step", "orchestrator", "deployer"])
def test_pods_of_a_run_reach_the_services_and_what_is_under_test(source: Peer) -> None:
    assert reaches(source, app("zenml"), 8080)
    assert reaches(source, app("s3"), 7070)
    assert reaches(source, app("mlflow"), 5000)
    assert reaches(source, SERVING, 3000)
    assert reaches(source, DNS, 53)
    assert not reaches(source, app("prometheus"), 9090)
    assert not reaches(source, app("zenml"), 22)
    assert not reaches(source, "93.184.216.34", 80)


def test_only_pods_with_rights_reach_the_api_server() -> None:
    server = "10.1.2.3"
    assert reaches(ORCHESTRATOR, server, 6443)
    assert reaches(DEPLOYER, server, 443)
    assert reaches(app("prometheus"), server, 6443)
    assert reaches(app("kube-state-metrics"), server, 6443)
    for other in (STEP, SERVING, *map(app, ("zenml", "mlflow", "s3", "grafana"))):
        assert not reaches(other, server, 443)


def test_the_service_reaches_its_store_and_nothing_else() -> None:
    assert reaches(SERVING, app("s3"), 7070)
    assert reaches(SERVING, DNS, 53)
    for name, port in (("zenml", 8080), ("mlflow", 5000), ("prometheus", 9090)):
        assert not reaches(SERVING, app(name), port)
    assert not reaches(SERVING, "93.184.216.34", 443)


def test_services_reach_each_other_only_where_they_have_to() -> None:
    ports = {"zenml": 8080, "mlflow": 5000, "s3": 7070, "prometheus": 9090, "grafana": 3000, "kube-state-metrics": 8080}
    found = {(a, b) for a in ports for b in ports if a != b and reaches(app(a), app(b), ports[b])}
    assert found == {("zenml", "s3"), ("grafana", "prometheus"), ("prometheus", "kube-state-metrics")}
    assert reaches(app("prometheus"), SERVING, 3000)


def test_clients_outside_reach_what_has_an_address_and_other_namespaces_nothing() -> None:
    client_outside, pod_elsewhere = "192.0.2.7", "10.244.3.9"
    for labels, port in ((SERVING, 3000), *((app(name), port) for name, port in (("zenml", 8080), ("s3", 7070)))):
        assert reaches(client_outside, labels, port)
        assert not reaches(pod_elsewhere, labels, port)
    assert not reaches(client_outside, app("prometheus"), 9090)
    assert not reaches(client_outside, STEP, 8080)
    for each in (each for each in QUICKSTART if each["kind"] == "Service"):
        target = SERVING if each["metadata"]["name"] in ("champion", "challenger") else app(each["metadata"]["name"])
        is_public = each["spec"].get("type") == "NodePort"
        assert reaches(client_outside, target, each["spec"]["ports"][0]["port"]) is is_public
        assert not reaches(pod_elsewhere, target, each["spec"]["ports"][0]["port"])


def test_pods_reach_the_services_of_the_site() -> None:
    assert reaches(STEP, "192.0.2.7", 443, "existing")
    assert reaches(SERVING, "192.0.2.7", 443, "existing")
    assert not reaches(STEP, "192.0.2.7", 22, "existing")


class _NoStreams:
    counters = Counters()
    nbytes = 0

    def __len__(self) -> int:
        return 0


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of everything that can be asked for."""
    metrics = Metrics("1", "behaviour", "1", "digest")
    metrics.answered("POST", "/v1/verdicts", 200, 0.1)
    metrics.refused([(0, "reason")])
    text = metrics.text(_NoStreams()).decode()  # type: ignore[arg-type]
    of_service = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    of_kube_state_metrics = {
        # https://github.com/kubernetes/kube-state-metrics/tree/v2.13.0/docs/metrics/workload, all of them stable
        "kube_job_status_active",
        "kube_job_status_failed",
        "kube_job_status_succeeded",
        "kube_job_status_start_time",
        "kube_job_status_completion_time",
        "kube_cronjob_next_schedule_time",
        "kube_cronjob_status_last_successful_time",
        "kube_deployment_status_replicas_available",
        "kube_pod_status_phase",
        "kube_pod_container_status_restarts_total",
        "kube_pod_container_status_terminated_reason",
        "kube_pod_container_status_last_terminated_reason",
    }
    return of_service | of_kube_state_metrics | {"up"}


def metrics_of(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-z_][a-z0-9_]*(?!\w|\s*\()", re.sub(r"\b\d+(\.\d+)?[a-z]*\b", " ", bare))
    return set(words) - {"and", "or", "unless", "offset", "bool"}


RULES = yaml.safe_load((KUBERNETES / "monitoring" / "config" / "alerts.yml").read_text("utf-8"))
ALERTS = [pytest.param(rule, id=rule["alert"]) for group in RULES["groups"] for rule in group["rules"]]
DASHBOARDS = [
    pytest.param(json.loads(path.read_text("utf-8")), id=path.stem)
    for path in sorted((KUBERNETES / "grafana" / "dashboards").glob("*.json"))
]


def test_there_is_an_alert_for_what_the_mission_names() -> None:
    assert {rule.values[0]["alert"] for rule in ALERTS} >= {
        *("ChampionDown", "ServiceNotReady", "SlowVerdicts", "RequestsFail", "FlowsRejected", "CheckpointsFail"),
        *("AlarmRateJumped", "ChampionWithoutTraffic"),
    }


@pytest.mark.parametrize("rule", ALERTS)
def test_alerts_ask_for_what_is_exported_and_say_what_to_do(rule: Document, exported: set[str]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert metrics_of(rule["expr"]) <= exported
    assert metrics_of(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.parametrize("board", DASHBOARDS)
def test_dashboards_are_complete_and_ask_for_what_is_exported(board: Document, exported: set[str]) -> None:
    assert board.keys() >= {"uid", "title", "schemaVersion", "panels", "templating", "time", "refresh", "tags"}
    assert board["uid"].startswith("flowsentry-")
    source = named("ConfigMap", "grafana-provisioning")["data"]["datasources.yaml"]
    (provisioned,) = yaml.safe_load(source)["datasources"]
    assert provisioned["url"] == "http://prometheus:9090"
    asked = 0
    for panel in board["panels"]:
        assert panel.keys() >= {"id", "title", "description", "type", "gridPos", "fieldConfig", "targets", "datasource"}
        assert panel["description"].endswith(".")
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        for target in panel["targets"]:
            for of in (panel, target):
                assert of["datasource"] == {"type": "prometheus", "uid": provisioned["uid"]}
            assert metrics_of(target["expr"].replace("$__rate_interval", "5m")) <= exported
            asked += len(metrics_of(target["expr"]))
    assert asked >= 8
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for a, b in combinations((panel["gridPos"] for panel in board["panels"]), 2):
        assert a["x"] + a["w"] <= 24
        is_apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert is_apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_dashboards_show_everything_that_the_service_counts(exported: set[str]) -> None:
    shown = {
        name
        for board in DASHBOARDS
        for panel in board.values[0]["panels"]
        for target in panel["targets"]
        for name in metrics_of(target["expr"])
    }
    of_service = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if name.startswith("flowsentry_")}
    assert of_service == {re.sub("_(bucket|sum|count)$", "", n) for n in shown if n.startswith("flowsentry_")}


def test_dashboards_that_are_provisioned_are_those_of_the_folder() -> None:
    boards = named("ConfigMap", "grafana-dashboards")["data"]
    assert (
        {f"{board.id}.json" for board in DASHBOARDS}
        == boards.keys()
        == {*("service.json", "model-quality.json", "pipelines.json")}
    )


def test_promtool_accepts_configuration_rules_and_expressions(tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not on PATH")
    folder = KUBERNETES / "monitoring" / "config"
    asked = [target["expr"] for board in DASHBOARDS for p in board.values[0]["panels"] for target in p["targets"]]
    asked = [expr.replace("$role", ".+").replace("$__rate_interval", "5m") for expr in asked]
    rules = [{"record": f"asked:{number}", "expr": expr} for number, expr in enumerate(asked)]
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}), "utf-8")
    (tmp_path / "fires.yml").write_text(alert_tests(str(folder / "alerts.yml")), "utf-8")
    for command in (
        ["check", "rules", folder / "alerts.yml", tmp_path / "asked.yml"],
        ["check", "config", "--syntax-only", folder / "prometheus.yml"],
        ["test", "rules", tmp_path / "fires.yml"],
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
