"""Manifests, diagnosis, and the deployer of Kubernetes killed anywhere; `test_kubernetes_cluster.py` has real pods."""

from __future__ import annotations

import base64
import copy
import http.server
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowsentry.errors import DeployError
from flowsentry.serving import bundle as bundles
from flowsentry.serving import diagnosis, drain, kubernetes, manifests
from flowsentry.serving.deployer import Deployed, Deployer
from flowsentry.serving.kubernetes import KubernetesDeployer
from flowsentry.serving.manifests import Object, Shape
from flowsentry.serving.settings import PREFIX, Settings
from tests.flowsentry.serving.stand_in_cluster import Cluster, Killed, StandInApi
from tests.flowsentry.serving.test_local import make_bundle

DIGEST = "ab" * 32
SHAPE = Shape("registry/serving:1", "s3://bucket", "http://store:7070")
DEPLOYED = Deployed(model_version="7", digest=DIGEST, url="")


def pod_of(deployment: Object) -> Object:
    spec: Object = deployment["spec"]["template"]["spec"]
    return spec


def env_of(container: Object) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


def test_the_pods_of_a_bundle_have_no_rights_and_cannot_change_their_image() -> None:
    spec = pod_of(manifests.deployment(SHAPE, DEPLOYED, replicas=1, attempt="a"))
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert set(container["resources"]["limits"]) == set(container["resources"]["requests"])
        assert not any("token" in mount["name"] and not mount["readOnly"] for mount in container["volumeMounts"])


def test_no_secret_is_written_into_a_deployment() -> None:
    spec = pod_of(manifests.deployment(SHAPE, DEPLOYED, replicas=1, attempt="a"))
    for container in (*spec["initContainers"], *spec["containers"]):
        values = env_of(container)
        assert not {name for name in values if "KEY" in name or name.endswith("TOKEN")}
        refs = [one for one in container["env"] if "valueFrom" in one]
        assert {one["name"] for one in refs} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_the_service_understands_its_settings(tmp_path: Path) -> None:
    spec = pod_of(manifests.deployment(SHAPE, DEPLOYED, replicas=1, attempt="a"))
    given = env_of(spec["containers"][0])
    (tmp_path / "token").write_text("secret\n")
    mount = next(one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "token")
    assert given[f"{PREFIX}TOKEN_FILE"] == f"{mount['mountPath']}/token"
    settings = Settings.read(given | {f"{PREFIX}TOKEN_FILE": str(tmp_path / "token")})
    assert settings.state == "s3://bucket/state"
    assert settings.token == "secret"
    assert settings.memory_bytes < 1 << 30


def test_a_bundle_is_fetched_where_it_is_served_from() -> None:
    spec = pod_of(manifests.deployment(SHAPE, DEPLOYED, replicas=1, attempt="a"))
    (fetch,), (serving,) = spec["initContainers"], spec["containers"]
    url, digest, folder = fetch["command"][-3:]
    assert (url, digest) == (f"s3://bucket/bundles/{DIGEST}.tar.gz", DIGEST)
    assert serving["command"][-1] == folder
    assert fetch["volumeMounts"][0] == serving["volumeMounts"][0]
    assert folder.startswith(fetch["volumeMounts"][0]["mountPath"] + "/")


def test_only_the_pods_of_a_bundle_are_selected() -> None:
    one = manifests.deployment(SHAPE, DEPLOYED, replicas=2, attempt="a")
    labels = one["spec"]["template"]["metadata"]["labels"]
    route = manifests.route(DIGEST)["spec"]["selector"]
    assert one["spec"]["selector"]["matchLabels"] == route
    assert route.items() <= labels.items()
    other = Deployed(model_version="7", digest="cd" * 32, url="")
    assert not route.items() <= manifests.selector(other.digest).items()
    assert not manifests.route(None)["spec"]["selector"].items() <= labels.items()
    assert all(len(value) <= 63 for value in labels.values())


def test_a_pod_has_the_time_to_drain_and_to_store_its_streams() -> None:
    spec = pod_of(manifests.deployment(SHAPE, DEPLOYED, replicas=1, attempt="a"))
    assert spec["terminationGracePeriodSeconds"] > 2 * drain.SECONDS + 20
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1] == "flowsentry.serving.drain"


def test_draining_releases_with_the_token_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("FLOWSENTRY_SERVICE_TOKEN_FILE", str(tmp_path / "token"))
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        begin = time.monotonic()
        drain.drain(server.server_port, seconds=0.3)
        thread.join()
        port = server.server_port
    assert time.monotonic() - begin >= 0.3
    assert asked == [("/v1/release", "Bearer secret")]
    begin = time.monotonic()
    drain.drain(port, seconds=5)  # it is dead already
    assert time.monotonic() - begin < 1


def seen(*, ready: int = 1, updated: int = 1, total: int = 1, observed: int = 2) -> Object:
    counts = {"readyReplicas": ready, "updatedReplicas": updated, "replicas": total, "observedGeneration": observed}
    template = {"metadata": {"labels": {manifests.ATTEMPT: "a"}}}
    return {"metadata": {"generation": 2}, "spec": {"template": template}, "status": counts}


@pytest.mark.parametrize(
    ("deployment", "replicas", "is_rolled_out"),
    [
        (seen(), 1, True),
        (seen(), 2, False),
        (seen(ready=2, updated=2, total=2), 2, True),
        (seen(observed=1), 1, False),
        (seen(ready=1, updated=1, total=2), 1, False),
        (seen(ready=0), 1, False),
        ({"metadata": {"generation": 1}, "spec": {}}, 1, False),
    ],
)
def test_a_deployment_is_rolled_out_when_only_new_pods_are_left(
    deployment: Object, replicas: int, is_rolled_out: bool
) -> None:
    assert diagnosis.is_rolled_out(deployment, replicas) is is_rolled_out


def a_pod(**status: Any) -> Object:
    return {"metadata": {"name": "it", "labels": {manifests.ATTEMPT: "a"}}, "status": status}


def ended(code: int, reason: str = "Error") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason}}


@pytest.mark.parametrize(
    ("status", "words", "is_lasting"),
    [
        (
            {
                "containerStatuses": [
                    {"name": "serving", "state": {"waiting": {"reason": "ErrImagePull", "message": "x"}}}
                ]
            },
            "cannot start: ErrImagePull: x",
            True,
        ),
        ({"containerStatuses": [{"name": "serving", "state": ended(3)}]}, "ended with exit status 3", True),
        ({"containerStatuses": [{"name": "serving", "state": ended(0)}]}, "ended with exit status 0", True),
        ({"containerStatuses": [{"name": "serving", "state": ended(139)}]}, "signal 11", True),
        ({"containerStatuses": [{"name": "serving", "lastState": ended(137, "OOMKilled")}]}, "more memory", True),
        ({"initContainerStatuses": [{"name": "fetch", "lastState": ended(1)}]}, "container fetch ended", True),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]},
            "no node takes its pod: 0/3 nodes",
            False,
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "Evicted low on memory", True),
    ],
)
def test_the_trouble_of_a_pod_is_named(status: Object, words: str, is_lasting: bool) -> None:
    trouble = diagnosis.find(seen(ready=0), [a_pod(**status)])
    assert trouble is not None
    assert words in trouble.what
    assert trouble.is_lasting is is_lasting


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"initContainerStatuses": [{"name": "fetch", "state": ended(0, "Completed")}]},
        {"containerStatuses": [{"name": "serving", "state": {"waiting": {"reason": "PodInitializing"}}}]},
        {"containerStatuses": [{"name": "serving", "state": {"running": {}}, "lastState": {}}]},
    ],
)
def test_a_pod_on_its_way_is_no_trouble(status: Object) -> None:
    assert diagnosis.find(seen(ready=0), [a_pod(**status)]) is None


def test_pods_that_may_not_exist_are_a_trouble_too() -> None:
    deployment = seen(ready=0)
    deployment["status"]["conditions"] = [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]
    trouble = diagnosis.find(deployment, [])
    assert trouble is not None
    assert "exceeded quota" in trouble.what


def test_pods_of_an_earlier_attempt_and_pods_that_end_do_not_count() -> None:
    old, ending, new = a_pod(), a_pod(), a_pod()
    old["metadata"]["labels"] = {manifests.ATTEMPT: "before"}
    ending["metadata"]["deletionTimestamp"] = "now"
    assert diagnosis.present(seen(), [old, ending, new]) == [new]


Make = Callable[..., KubernetesDeployer]


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    data = {"token": base64.b64encode(b"secret").decode()}
    cluster.add("v1/secrets", {"metadata": {"name": "serving"}, "data": data})
    return cluster


@pytest.fixture
def make(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Deployers of one cluster, each as in a process of its own."""

    def answers(deployer: KubernetesDeployer, service: str, digest: str) -> None:
        if cluster.leads_to(service) != digest[:12]:
            raise DeployError(f"{service} leads to {cluster.leads_to(service)}")

    monkeypatch.setattr(KubernetesDeployer, "_await_answer", answers)

    def make(kill_at: int = -1, **shape: Any) -> KubernetesDeployer:
        changed = replace(SHAPE, bucket_url=f"file://{tmp_path}/bucket", **shape)
        deployer = KubernetesDeployer("ns", changed, ready_seconds=2)
        api = StandInApi(cluster)
        api.kill_at = kill_at
        deployer._known_api = api  # type: ignore[assignment]
        return deployer

    return make


def deploy(make: Make, bundle: tuple[Path, str, str]) -> None:
    deployer = make()
    champion = deployer.record().champion
    deployer.start_challenger(*bundle)
    deployer.promote(bundle[2], champion.digest if champion else None)


def versions(deployer: Deployer) -> tuple[str | None, str | None, str | None]:
    record = deployer.record()
    champion, previous, challenger = (
        one and one.model_version for one in (record.champion, record.previous, record.challenger)
    )
    return champion, previous, challenger


def test_a_challenger_becomes_champion_and_the_champion_stays_at_hand(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    first, second, third = (make_bundle(tmp_path, version) for version in "123")
    deploy(make, first)
    deployer = make()
    endpoint = deployer.start_challenger(*second)
    assert (endpoint.url, endpoint.token) == ("http://challenger.ns.svc:3000", "secret")
    assert versions(deployer) == ("1", None, "2")
    assert (cluster.leads_to("champion"), cluster.leads_to("challenger")) == (first[2][:12], second[2][:12])
    record = deployer.promote(second[2], first[2])
    assert versions(deployer) == ("2", "1", None)
    assert record.champion is not None and record.champion.url == "http://champion.ns.svc:3000"
    assert cluster.replicas() == {manifests.name(first[2]): 0, manifests.name(second[2]): 1}
    assert cluster.leads_to("challenger") == manifests.NOBODY
    deploy(make, third)
    assert cluster.replicas() == {manifests.name(second[2]): 0, manifests.name(third[2]): 1}
    deployer.rollback()
    assert versions(deployer) == ("2", "3", None)
    assert cluster.replicas() == {manifests.name(second[2]): 1, manifests.name(third[2]): 0}


def test_killed_anywhere_the_same_call_again_completes_it_and_a_champion_always_serves(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    first, second = make_bundle(tmp_path, "1"), make_bundle(tmp_path, "2")
    deploy(make, first)
    beginning = copy.deepcopy(cluster.objects)

    def challenge(deployer: KubernetesDeployer) -> None:
        deployer.start_challenger(*second)

    def promote(deployer: KubernetesDeployer) -> None:
        deployer.promote(second[2], first[2])

    killed: list[int] = []
    for actions, expected in (
        ([challenge], ("1", None, "2")),
        ([challenge, promote], ("2", "1", None)),
        ([challenge, promote, KubernetesDeployer.rollback], ("1", "2", None)),
    ):
        *before, last = actions
        cluster.objects = copy.deepcopy(beginning)
        for action in before:
            action(make())
        prepared = copy.deepcopy(cluster.objects)
        for kill_at in range(100):
            cluster.objects = copy.deepcopy(prepared)
            dying = make(kill_at)
            try:
                last(dying)
            except Killed:
                assert_somebody_serves(cluster)
                again = make()
                if last is challenge:
                    again._identity = dying._identity  # else the trial goes on for a while
                if last is KubernetesDeployer.rollback and not again._read().unfinished and versions(again) == expected:
                    continue  # all of it was done
                last(again)
            else:
                killed.append(kill_at)
                break
            assert_somebody_serves(cluster)
            assert versions(again) == expected
            assert cluster.leads_to("champion") == {"1": first, "2": second}[expected[0] or ""][2][:12]
    assert len(killed) == 3 and min(killed) >= 6


def assert_somebody_serves(cluster: Cluster) -> None:
    serving = f"flowsentry-{cluster.leads_to('champion')}"
    assert cluster.replicas()[serving] >= 1


def test_whatever_comes_next_completes_a_promotion_that_was_decided(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    first, second = make_bundle(tmp_path, "1"), make_bundle(tmp_path, "2")
    deploy(make, first)
    make().start_challenger(*second)
    dying = make()
    api: Any = dying._known_api

    def decided(kind: str, name: str) -> None:
        if kind == "v1/services":
            raise Killed

    api.on_change = decided
    with pytest.raises(Killed):
        dying.promote(second[2], first[2])
    assert cluster.leads_to("champion") == first[2][:12]
    assert versions(make()) == ("2", "1", None)
    assert make().endpoint().url == "http://champion.ns.svc:3000"
    assert cluster.leads_to("champion") == second[2][:12]


def test_of_two_runs_one_promotes_and_the_other_is_told(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = (make_bundle(tmp_path, version) for version in "123")
    deploy(make, first)
    slow = make()
    slow.start_challenger(*second)
    api: Any = slow._known_api

    def meanwhile(kind: str, name: str) -> None:
        if kind == "v1/configmaps":
            api.on_change = lambda kind, name: None
            make().stop_challenger()
            deploy(make, third)

    api.on_change = meanwhile
    with pytest.raises(DeployError, match="no challenger to promote"):
        slow.promote(second[2], first[2])
    assert versions(slow) == ("3", "1", None)
    assert cluster.leads_to("champion") == third[2][:12]


def test_services_changed_meanwhile_follow_the_newest_record(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = (make_bundle(tmp_path, version) for version in "123")
    deploy(make, first)
    deploy(make, second)
    slow = make()
    api: Any = slow._known_api
    times = []

    def meanwhile(kind: str, name: str) -> None:
        if kind == "v1/services" and not times:
            times.append(name)
            deploy(make, third)

    api.on_change = meanwhile
    slow.rollback()
    assert times
    assert cluster.leads_to("champion") == third[2][:12]
    assert versions(slow) == ("3", "1", None)


def test_only_the_tested_challenger_replaces_only_the_champion_that_it_was_compared_with(
    make: Make, tmp_path: Path
) -> None:
    first, second = make_bundle(tmp_path, "1"), make_bundle(tmp_path, "2")
    deploy(make, first)
    deployer = make()
    with pytest.raises(DeployError, match="no challenger"):
        deployer.promote(second[2], first[2])
    deployer.start_challenger(*second)
    with pytest.raises(DeployError, match="the challenger is model version 2, bundle"):
        deployer.promote("0" * 64, first[2])
    with pytest.raises(DeployError, match="the challenger is model version 2"):
        deployer.stop_challenger("0" * 64)
    for instead_of, words in ((None, "was compared with none"), ("0" * 64, "with bundle 000000000000")):
        with pytest.raises(DeployError, match=f"the champion is model version 1, .*{words}: another run"):
            deployer.promote(second[2], instead_of)
    assert versions(deployer) == ("1", None, "2")
    deployer.stop_challenger(second[2])
    deployer.stop_challenger(second[2])
    assert versions(deployer) == ("1", None, None)
    assert deployer.challenger_log() == ""


def test_a_challenger_on_trial_is_left_alone_while_its_owner_lives(
    make: Make, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_bundle(tmp_path, "1"), make_bundle(tmp_path, "2")
    monkeypatch.setenv("HOSTNAME", "step-pod")
    cluster.pods["step-pod"] = {"metadata": {"name": "step-pod"}, "status": {"phase": "Running"}}
    owner = make()
    owner._known_api.is_inside = True  # type: ignore[union-attr]
    owner.start_challenger(*first)
    with pytest.raises(DeployError, match="model version 1 is on trial, for step-pod since 0 s"):
        make().start_challenger(*second)
    owner.start_challenger(*first)
    with monkeypatch.context() as patch:
        patch.setattr(kubernetes, "TRIAL_SECONDS", -1)
        make()._check_free(owner._read())
    cluster.pods["step-pod"]["status"]["phase"] = "Failed"
    make().start_challenger(*second)
    assert versions(make()) == (None, None, "2")
    assert list(cluster.replicas()) == [manifests.name(second[2])]


def test_a_challenger_that_was_started_again_is_not_promoted(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    first = make_bundle(tmp_path, "1")
    deployer = make()
    deployer.start_challenger(*first)
    api: Any = deployer._known_api
    deployment = cluster.objects["apps/v1/deployments", manifests.name(first[2])]
    status = {"containerStatuses": [{"name": "serving", "state": {"running": {}}, "lastState": ended(9)}]}
    pod = {"metadata": {"name": "it", "labels": deployment["spec"]["template"]["metadata"]["labels"]}, "status": status}
    monkey = api.list
    api.list = lambda kind, **query: [pod] if kind == "v1/pods" else monkey(kind, **query)
    with pytest.raises(DeployError, match=r"(?s)cannot be promoted: .*exit status 9 .*its last line"):
        deployer.promote(first[2], None)
    assert versions(deployer) == (None, None, "1")
    assert "exit status 9" in deployer.challenger_log()


def test_replicas_get_a_budget_and_an_autoscaler_only_where_asked(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    first = make_bundle(tmp_path, "1")
    deploy(make, first)
    name = manifests.name(first[2])
    assert not {kind for kind, _ in cluster.objects if "budget" in kind or "autoscaler" in kind}
    make(replicas=2, most_replicas=4).endpoint()
    budget = cluster.objects["policy/v1/poddisruptionbudgets", name]
    assert budget["spec"]["minAvailable"] == 1
    assert budget["metadata"]["ownerReferences"][0]["name"] == name
    scaler = cluster.objects["autoscaling/v2/horizontalpodautoscalers", name]
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 4)
    cluster.objects["apps/v1/deployments", name]["spec"]["replicas"] = 3
    make(replicas=2, most_replicas=4).endpoint()
    assert cluster.replicas() == {name: 3}
    make().endpoint()
    assert cluster.replicas() == {name: 1}


def test_stop_scales_all_to_none_and_the_champion_comes_back(make: Make, cluster: Cluster, tmp_path: Path) -> None:
    first, second = make_bundle(tmp_path, "1"), make_bundle(tmp_path, "2")
    deploy(make, first)
    make().start_challenger(*second)
    deployer = make()
    deployer.stop()
    assert cluster.replicas() == {manifests.name(first[2]): 0}
    status = deployer.status()
    assert (status.running, status.champion and status.champion.state) == (False, "stopped")
    assert versions(deployer) == ("1", None, None)
    deployer.endpoint()
    assert cluster.replicas() == {manifests.name(first[2]): 1}
    del cluster.objects["apps/v1/deployments", manifests.name(first[2])]
    deployer.endpoint()
    assert cluster.replicas() == {manifests.name(first[2]): 1}


def test_an_altered_bundle_is_not_uploaded(make: Make, tmp_path: Path) -> None:
    path, version, digest = make_bundle(tmp_path, "1")
    with pytest.raises(DeployError, match="digest"):
        make().start_challenger(path, version, "0" * 64)
    with pytest.raises(DeployError, match="is model version 1, not 7"):
        make().start_challenger(path, "7", digest)
    (path / "src" / "more.py").write_text("")
    with pytest.raises(DeployError, match=r"src/more\.py is not what was built"):
        make().start_challenger(path, version, digest)
    assert not (tmp_path / "bucket").exists()


def test_an_archive_is_stored_once_and_old_ones_are_forgotten(make: Make, tmp_path: Path) -> None:
    made = [make_bundle(tmp_path, version) for version in "1234567"]
    for bundle in made:
        deploy(make, bundle)
    left = {path.name.removesuffix(".tar.gz") for path in (tmp_path / "bucket" / "bundles").iterdir()}
    assert left == {digest for _, _, digest in made[2:]}
    archive = tmp_path / "bucket" / "bundles" / f"{made[-1][2]}.tar.gz"
    assert bundles.unpack(archive, tmp_path / "unpacked", made[-1][2]).digest == made[-1][2]
    before = archive.stat().st_mtime_ns
    make().start_challenger(*made[-1])
    assert archive.stat().st_mtime_ns == before
    archive.write_bytes(b"half")
    make()._upload(bundles.verify(made[-1][0]))
    assert archive.stat().st_size > 100


def test_checkpoints_that_nobody_comes_back_to_are_forgotten(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "bucket" / "state" / "behaviour-2"
    folder.mkdir(parents=True)
    days = {"production": 29, "left": 31, "replay-0123abcd": 2, "replay-0123abce": 0.5, "gate-0123456789abcdef": 2}
    for name, age in days.items():
        (folder / f"{name}.state").write_bytes(b"x")
        os.utime(folder / f"{name}.state", 2 * (time.time() - age * 86_400,))
    deploy(make, make_bundle(tmp_path, "1"))
    assert {path.stem for path in folder.iterdir()} == {"production", "replay-0123abce"}


def test_a_damaged_record_is_said_to_be_one(make: Make, cluster: Cluster) -> None:
    cluster.add("v1/configmaps", {"metadata": {"name": kubernetes.RECORD}, "data": {"record.json": '{"champion": 1}'}})
    with pytest.raises(DeployError, match=r"ConfigMap flowsentry-deployment: .* damaged"):
        make().record()


def test_a_namespace_without_its_secret_or_services_is_said_to_be_one(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    del cluster.objects["v1/services", "champion"]
    with pytest.raises(DeployError, match="champion"):
        make().start_challenger(*make_bundle(tmp_path, "1"))
    assert versions(make()) == (None, None, None)


def test_without_a_kubeconfig_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(DeployError, match="no Kubernetes cluster is known"):
        KubernetesDeployer("ns", SHAPE).record()
