"""The deployer of Kubernetes on a real cluster: real pods, in a namespace that is removed again.

The deployer works with the rights of the account `deployer` of `stacks/kubernetes`, and nothing more; the namespace is
under Pod Security `restricted`. The serving image is the site's, or what FLOWSENTRY_TEST_SERVING_IMAGE names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from flowsentry.config import ServiceGateSettings
from flowsentry.errors import DeployError, ServiceError
from flowsentry.serving import bundle as bundles
from flowsentry.serving import kubernetes, manifests
from flowsentry.serving.client import Client, StreamClient, encode
from flowsentry.serving.deployer import Record
from flowsentry.serving.kubernetes import KubernetesDeployer
from flowsentry.serving.kubernetes_api import Api
from flowsentry.serving.manifests import Object, Shape
from flowsentry.serving.protocol import JSON
from flowsentry.serving.service_gate import trial
from tests.flowsentry.serving.test_broken_challengers import TAKE, replaced, seal
from tests.flowsentry.serving.test_service_gate import Case, make_case

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ACCOUNTS = Path(__file__).parents[3] / "stacks" / "kubernetes" / "base" / "accounts.yaml"
TOKEN = "token-of-the-tests"
ACCESS, SECRET = "flowsentry", "secret-of-the-tests"
GATE = ServiceGateSettings(single_requests=20, max_p99_ms=2000)
PLURALS = {
    "Role": "rbac.authorization.k8s.io/v1/roles",
    "RoleBinding": "rbac.authorization.k8s.io/v1/rolebindings",
    "ServiceAccount": "v1/serviceaccounts",
    "Secret": "v1/secrets",
    "Service": "v1/services",
    "Deployment": "apps/v1/deployments",
}


@dataclass
class Bench:
    """A namespace with a store, and bundles to serve."""

    admin: Api
    shape: Shape
    urls: dict[str, str]
    case: Case
    bundle: Path
    folder: Path
    context: str
    said: list[str]

    def deployer(self, **shape: Any) -> KubernetesDeployer:
        """As another process would make it."""
        return KubernetesDeployer(
            self.admin.namespace,
            replace(self.shape, **shape),
            champion_url=self.urls["champion"],
            challenger_url=self.urls["challenger"],
            context=self.context,
            ready_seconds=180,
            on_progress=self.said.append,
        )

    def make(self, version: str, alter: Callable[[Path], None] = lambda _: None) -> tuple[Path, str, str]:
        """Arguments of `start_challenger`."""
        copy = self.folder / version
        if not copy.exists():
            shutil.copytree(self.bundle, copy)
            alter(copy / "src")
        return copy, version, seal(copy, version)

    def champion(self, version: str, alter: Callable[[Path], None] = lambda _: None) -> str:
        """See that a version is in production; its digest."""
        deployer, bundle = self.deployer(), self.make(version, alter)
        champion = deployer.record().champion
        if champion is None or champion.digest != bundle[2]:
            deployer.start_challenger(*bundle)
            deployer.promote(bundle[2], champion.digest if champion else None)
        deployer.endpoint()
        return bundle[2]

    def pods(self, digest: str) -> list[str]:
        labels = f"{manifests.DIGEST}={digest[:12]}"
        found = self.admin.list("v1/pods", labelSelector=labels)
        return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def deployments(self) -> set[str]:
        return {found["metadata"]["name"] for found in self.admin.list("apps/v1/deployments")} - {"s3"}

    def client(self, service: str = "champion", patience: float = 90) -> Client:
        return Client(self.urls[service], TOKEN, timeout=10, patience=patience)


@pytest.fixture(scope="module")
def bench(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    missing = [name for name in ("KUBECONFIG", "TEST_REGISTRY", "TEST_HOST") if not os.environ.get(name)]
    if missing:
        pytest.skip(f"needs a Kubernetes: {', '.join(missing)} not set")
    folder = tmp_path_factory.mktemp("cluster")
    admin = Api(f"flowsentry-serving-{os.urandom(4).hex()}", None)
    make_namespace(admin)
    try:
        for document in yaml.safe_load_all(ACCOUNTS.read_text()):
            if "orchestrator" not in document["metadata"]["name"]:
                make(admin, document)
        make_store(admin)
        ports = {name: make_service(admin, name) for name in ("champion", "challenger")}
        context = log_in(admin, folder / "kubeconfig")
        case = make_case(small, "behaviour", "gradient_boosting")
        bundle = bundles.build(case.detector, "1", folder / "bundle").path
        port = ports_of(admin, "s3")
        s3_url = f"http://{os.environ['TEST_HOST']}:{port}"
        shape = Shape(image(), "s3://flowsentry", s3_url)
        make_bucket(s3_url)
        host = near(port)
        urls = {name: f"http://{host}:{port}" for name, port in ports.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
            yield Bench(admin, shape, urls, case, bundle, folder, context, [])
    finally:
        admin._json("DELETE", f"/api/v1/namespaces/{admin.namespace}", {})


def image() -> str:
    from stacks import site

    registry = os.environ["TEST_REGISTRY"]
    return os.environ.get("FLOWSENTRY_TEST_SERVING_IMAGE") or f"{registry}/flowsentry-serving:{site.image_tag()}"


def near(port: int) -> str:
    """Where node ports answer, this one among them: the loopback, if they do there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return "127.0.0.1"
    return os.environ["TEST_HOST"]


def make(admin: Api, document: Object) -> Object:
    document["metadata"]["namespace"] = admin.namespace
    for subject in document.get("subjects", []):
        subject["namespace"] = admin.namespace
    return admin.create(PLURALS[document["kind"]], document)


def make_namespace(admin: Api) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": admin.namespace, "labels": labels}}
    admin._json("POST", "/api/v1/namespaces", body)


def make_store(admin: Api) -> None:
    keys = {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}
    serving = {"token": TOKEN, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, data in (("s3", keys), ("serving", serving)):
        make(admin, {"kind": "Secret", "metadata": {"name": name}, "stringData": data})
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "s3",
        "image": "versity/versitygw:v1.8.0",
        "args": ["--port", ":7070", "--health", "/health", "posix", "/data"],
        "envFrom": [{"secretRef": {"name": "s3"}}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 7070}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        "securityContext": security,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }  # fmt: skip
    labels = {"app": "s3"}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    make(admin, {"kind": "Deployment", "metadata": {"name": "s3"}, "spec": spec})
    ports = [{"port": 7070}]
    spec = {"type": "NodePort", "selector": labels, "ports": ports}
    make(admin, {"kind": "Service", "metadata": {"name": "s3"}, "spec": spec})


def make_service(admin: Api, name: str) -> int:
    """As the manifests have it: leading nowhere."""
    spec = {"type": "NodePort", "ports": [{"port": 3000}]}
    make(admin, {"kind": "Service", "metadata": {"name": name}, "spec": spec})
    return ports_of(admin, name)


def ports_of(admin: Api, name: str) -> int:
    return int(admin.get("v1/services", name)["spec"]["ports"][0]["nodePort"])


def make_bucket(url: str) -> None:
    import s3fs

    files = s3fs.S3FileSystem(key=ACCESS, secret=SECRET, client_kwargs={"endpoint_url": url})
    limit = time.monotonic() + 60
    while True:
        try:
            files.mkdir("flowsentry")
            return
        except Exception as error:
            assert time.monotonic() < limit, error
            time.sleep(0.5)


def log_in(admin: Api, path: Path) -> str:
    """A kubeconfig for the account `deployer`; its context."""
    settings = admin._client.configuration
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    place = f"/api/v1/namespaces/{admin.namespace}/serviceaccounts/deployer/token"
    token = admin._json("POST", place, asked)["status"]["token"]
    authority = base64.b64encode(Path(settings.ssl_ca_cert).read_bytes()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": settings.host, "certificate-authority-data": authority}}],
        "users": [{"name": "deployer", "user": {"token": token}}],
        "contexts": [{"name": "deployer", "context": {"cluster": "it", "user": "deployer"}}],
        "current-context": "deployer",
    }
    path.write_text(yaml.safe_dump(config))
    return "deployer"


class Load:
    """Requests of many streams at a steady rate for the duration of a block."""

    def __init__(self, bench: Bench, rate: int, threads: int = 10) -> None:
        self.failures: list[str] = []
        self.versions: Counter[str] = Counter()
        self.longest = 0.0
        self._bench, self._pause, self._threads = bench, threads / rate, threads
        self._body = encode(bench.case.reports.head(1), JSON)
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Load:
        for number in range(self._threads):
            self._pool.submit(self._send, f"load-{number}")
        while sum(self.versions.values()) < 50:
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(2)
        self._end.set()
        self._pool.shutdown()

    def _send(self, stream: str) -> None:
        """Without `seen`, so that a request whose connection breaks cannot be sent again: it has failed."""
        with self._bench.client(patience=10) as client:
            due = time.monotonic()
            while not self._end.is_set():
                begin = time.monotonic()
                try:
                    reply = client.post_verdicts(self._body, stream=stream)
                    self.versions[json.loads(reply.body)["model_version"]] += 1
                except ServiceError as error:
                    self.failures.append(str(error))
                self.longest = max(self.longest, time.monotonic() - begin)
                due = max(due + self._pause, time.monotonic() - 1)
                time.sleep(max(due - time.monotonic(), 0))


class Replay:
    """Flows of one stream at a steady rate in the background, and what came back."""

    def __init__(self, bench: Bench, stream: str, flows: int, rate: float = 50) -> None:
        self.reports = bench.case.reports.head(flows)
        self.rows: list[dict[str, Any]] = []
        self.resent = 0
        self._bench, self._stream, self._rate = bench, stream, rate
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._run)

    def _run(self) -> None:
        with self._bench.client() as client:
            feed = StreamClient(client, self._stream)
            for begin in range(0, len(self.reports), 10):
                if self._end.is_set():
                    break
                clock = time.monotonic()
                self.rows += feed.send(self.reports.iloc[begin : begin + 10]).rows()
                self.resent = feed.resent
                time.sleep(max(clock + 10 / self._rate - time.monotonic(), 0))

    def wait_for(self, flows: int) -> None:
        while len(self.rows) < flows:
            assert not self._done.done(), self._done.exception()
            time.sleep(0.05)

    def finish(self) -> None:
        self._pool.shutdown()
        self._done.result()

    def stop(self) -> None:
        """Leave the rest out."""
        self._end.set()
        self.finish()
        self.reports = self.reports.head(len(self.rows))

    def assert_like_offline(self, case: Case) -> None:
        """Every report has exactly one verdict, the offline one."""
        offline = case.detector.verdicts(self.reports)
        assert [row["flow_id"] for row in self.rows] == self.reports["flow_id"].tolist()
        assert [row["anomaly_score"] for row in self.rows] == offline["anomaly_score"].tolist()
        assert [row["label"] for row in self.rows] == offline["label"].tolist()
        assert [row["warm"] for row in self.rows] == offline["warm"].tolist()


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "it never came to be"
        time.sleep(0.2)


def test_a_tested_bundle_becomes_the_champion_and_answers_as_offline(bench: Bench) -> None:
    deployer = bench.deployer()
    assert deployer.record() == Record()
    assert not deployer.status().running
    with pytest.raises(DeployError, match="no model has been deployed"):
        deployer.endpoint()
    path, version, digest = bench.make("1")
    case = bench.case
    decision = trial(
        deployer, path, digest, case.detector, case.reports, case.flows, case.validation, GATE, model_version=version
    )
    assert decision.passed, decision.reason
    assert decision.answered == len(case.reports)
    assert '"event":"ready"' in deployer.challenger_log()
    status = deployer.status()
    assert status.challenger is not None and status.challenger.healthy and status.champion is None
    record = deployer.promote(digest, None)
    assert record.champion is not None and record.champion.digest == digest
    assert (record.previous, record.challenger, deployer.record()) == (None, None, record)
    endpoint = deployer.endpoint()
    assert (endpoint.url, endpoint.token) == (bench.urls["champion"], TOKEN)
    replay = Replay(bench, "first", 300, rate=1000)
    replay.finish()
    replay.assert_like_offline(case)
    with bench.client("challenger") as client:
        until(lambda: not client.ready(), 10)


def test_no_request_fails_while_champions_change(bench: Bench) -> None:
    first, second = bench.champion("1"), bench.make("2")
    times = [time.monotonic()]
    bench.deployer().start_challenger(*second)
    times.append(time.monotonic())
    replay = Replay(bench, "switched", 10_000)
    with Load(bench, 100) as load:
        times.append(time.monotonic())
        promoted = bench.deployer().promote(second[2], first)
        times.append(time.monotonic())
        time.sleep(3)
        times.append(time.monotonic())
        back = bench.deployer().rollback()
        times.append(time.monotonic())
    replay.stop()
    assert load.failures == []
    assert not bench.admin.list("v1/events", fieldSelector="reason=FailedPreStopHook")
    assert not [said for said in bench.said if "could not" in said or "cannot be seen" in said]
    assert set(load.versions) == {"1", "2"} and min(load.versions.values()) > 100
    replay.assert_like_offline(bench.case)
    assert {row["model_version"] for row in replay.rows} == {"1", "2"}
    assert promoted.champion is not None and promoted.previous is not None
    assert (promoted.champion.digest, promoted.previous.digest) == (second[2], first)
    assert (back.champion, back.previous) == (promoted.previous, promoted.champion)
    assert bench.deployments() == {manifests.name(first), manifests.name(second[2])}
    assert bench.admin.get("apps/v1/deployments", manifests.name(second[2]))["spec"]["replicas"] == 0
    start, _, switch, _, turn = (b - a for a, b in pairwise(times))
    print(
        f"\nstarted in {start:.1f} s, promoted in {switch:.1f} s, rolled back in {turn:.1f} s, longest request "
        f"{load.longest:.2f} s of {dict(load.versions)}; {len(replay.rows)} flows replayed, {replay.resent} resent"
    )


def die_once(source: Path) -> None:
    """End in the middle of a request, at the 700th flow of a stream, without a last checkpoint."""
    dead = "__import__('pathlib').Path('/tmp/dead')"
    die = f"        if self.stream.seen >= 700 and not {dead}.exists():\n"
    die += f"            {dead}.touch()\n            __import__('os')._exit(9)\n"
    replaced(source / "flowsentry" / "detector.py", TAKE, die + TAKE)


def test_no_verdict_is_lost_when_the_champion_dies_and_when_its_pod_is_killed(bench: Bench) -> None:
    champion = bench.champion("dies-once", die_once)
    replay = Replay(bench, "killed", 2000)
    replay.wait_for(800)
    status = bench.deployer().status().champion
    assert status is not None
    assert (status.restarts, status.exit_status) == (1, 9)
    assert replay.resent > 0
    (pod,) = bench.pods(champion)
    replay.wait_for(1200)
    bench.admin._json("DELETE", bench.admin._path("v1/pods", pod), {"gracePeriodSeconds": 0})
    replay.finish()
    replay.assert_like_offline(bench.case)
    assert bench.pods(champion) != [pod]


def test_one_of_two_replicas_may_be_evicted_and_not_both(bench: Bench) -> None:
    champion = bench.champion("1")
    pair = bench.deployer(replicas=2)
    pair.endpoint()
    until(lambda: bench.admin.get("apps/v1/deployments", manifests.name(champion))["status"].get("readyReplicas") == 2)
    replay = Replay(bench, "evicted", 1500)
    replay.wait_for(400)
    pods = bench.pods(champion)
    until(lambda: allowed(bench, champion) == 1)
    evict(bench, pods[0])
    with pytest.raises(DeployError, match="disruption budget"):
        evict(bench, pods[1])
    replay.wait_for(800)
    until(lambda: allowed(bench, champion) == 1)
    evict(bench, pods[1])  # one of the two was that which the client had met
    replay.finish()
    replay.assert_like_offline(bench.case)
    assert not set(pods) & set(bench.pods(champion))
    bench.deployer().endpoint()
    assert bench.admin.get("apps/v1/deployments", manifests.name(champion))["spec"]["replicas"] == 1


def allowed(bench: Bench, digest: str) -> int:
    found = bench.admin.get("policy/v1/poddisruptionbudgets", manifests.name(digest))
    return int(found.get("status", {}).get("disruptionsAllowed", 0))


def evict(bench: Bench, pod: str) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    bench.admin._json("POST", bench.admin._path("v1/pods", pod) + "/eviction", body)


def crash(source: Path) -> None:
    shutil.rmtree(source / "detector" / "model")


def no_image(bench: Bench, _: pytest.MonkeyPatch) -> tuple[KubernetesDeployer, tuple[Path, str, str]]:
    name = f"{os.environ['TEST_REGISTRY']}/flowsentry-serving:no-such-tag"
    return bench.deployer(image=name), bench.make("no-image")


def crashing(bench: Bench, _: pytest.MonkeyPatch) -> tuple[KubernetesDeployer, tuple[Path, str, str]]:
    return bench.deployer(), bench.make("crashing", crash)


def other_archive(bench: Bench, patch: pytest.MonkeyPatch) -> tuple[KubernetesDeployer, tuple[Path, str, str]]:
    """Somebody has put another bundle, whole, where this one should be."""
    deployer, (path, version, digest) = bench.deployer(), bench.make("swapped")
    other = bundles.verify(bench.make("other")[0])
    upload = deployer._upload

    def swapped(bundle: bundles.Bundle) -> None:
        upload(other)
        files, root = deployer._bucket()
        files.copy(f"{root}/{other.digest}.tar.gz", f"{root}/{digest}.tar.gz")

    patch.setattr(deployer, "_upload", swapped)
    return deployer, (path, version, digest)


def too_large(bench: Bench, patch: pytest.MonkeyPatch) -> tuple[KubernetesDeployer, tuple[Path, str, str]]:
    patch.setattr(kubernetes, "SCHEDULING_SECONDS", 2)
    patch.setitem(manifests.REQUESTS, "memory", "9Ti")
    patch.setitem(manifests.LIMITS, "memory", "9Ti")
    return bench.deployer(), bench.make("too-large")


def too_small(bench: Bench, patch: pytest.MonkeyPatch) -> tuple[KubernetesDeployer, tuple[Path, str, str]]:
    patch.setitem(manifests.REQUESTS, "memory", "48Mi")
    patch.setitem(manifests.LIMITS, "memory", "48Mi")
    return bench.deployer(), bench.make("too-small")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (no_image, r"(?s)cannot start: (ErrImagePull|ImagePullBackOff).*no-such-tag"),
        (crashing, r"(?s)container serving ended with exit status .*not a stored model"),
        (other_archive, r"(?s)container fetch ended with exit status 1.*digest"),
        (too_large, r"(?s)no node takes its pod: .*Insufficient memory"),
        (too_small, r"OOMKilled"),
    ],
)
def test_a_challenger_that_cannot_start_says_why_and_leaves_the_champion(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, prepare: Callable[..., Any], words: str
) -> None:
    champion = bench.champion("1")
    before = bench.pods(champion)
    deployer, challenger = prepare(bench, monkeypatch)
    with pytest.raises(DeployError, match=words) as error:
        deployer.start_challenger(*challenger)
    print(error.value)
    record = deployer.record()
    assert record.challenger is None
    assert record.champion is not None and record.champion.digest == champion
    until(lambda: manifests.name(challenger[2]) not in bench.deployments(), 10)
    assert bench.pods(champion) == before
    with bench.client(patience=0) as client:
        assert client.model()["digest"] == champion


def test_stop_ends_all_pods_and_the_champion_comes_back_with_its_streams(bench: Bench) -> None:
    champion = bench.champion("1")
    first = Replay(bench, "stopped", 200, rate=1000)
    first.finish()
    deployer = bench.deployer()
    deployer.stop()
    until(lambda: bench.pods(champion) == [])
    status = deployer.status()
    assert (status.running, status.champion and status.champion.state) == (False, "stopped")
    deployer.endpoint()
    with bench.client() as client:
        assert (client.stream_status("stopped") or {})["seen"] == 200
