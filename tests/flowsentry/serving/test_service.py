"""The service as `bentoml serve` starts it: a real process, on a bundle's layout."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import flowsentry
from flowsentry.detector import Detector
from flowsentry.errors import StoreError
from flowsentry.serving import schema
from flowsentry.serving.app import Model
from flowsentry.serving.store import FolderStore
from flowsentry.serving.streams import Limits, Streams
from tests.flowsentry.serving.test_app import flow
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

COMMAND = (sys.executable, "-m", "bentoml", "serve", "flowsentry.serving.service:FlowSentry", "--host", "127.0.0.1")


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small, family="logistic_regression")


@pytest.fixture(scope="module")
def code(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src` of a bundle."""
    folder = tmp_path_factory.mktemp("bundle") / "src"
    shutil.copytree(Path(flowsentry.__file__).parent, folder / "flowsentry")
    detector.save(folder / "detector")
    about = {"model_version": "7", "detector_digest": detector.digest}
    (folder / "bundle.json").write_text(json.dumps(about))
    return folder


def _environment(code: Path, home: Path, **changed: str) -> dict[str, str]:
    """Nothing in it forbids usage reports: the service does."""
    passed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return passed | {
        "PYTHONPATH": str(code), "FLOWSENTRY_SERVICE_STATE": str(home / "state"), "BENTOML_HOME": str(home / "bentoml"),
        "__BENTOML_DEBUG_USAGE": "True",
    } | changed  # fmt: skip


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    url: str
    home: Path

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                content, status = response.read(), response.status
        except urllib.error.HTTPError as error:
            with error:
                content, status = error.read(), error.code
        return status, content

    def log(self) -> str:
        return (self.home / "log").read_text()


@pytest.fixture(scope="module")
def running(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(port)], cwd=code, env=_environment(code, home), stdout=log, stderr=log
        )
    service = Running(process, f"http://127.0.0.1:{port}", home)
    try:
        for _ in range(1200):
            try:
                if service.ask("/readyz")[0] == 200:
                    break
            except OSError:
                assert process.poll() is None, service.log()
            time.sleep(0.05)
        else:
            pytest.fail(service.log())
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_a_started_service_answers_at_once_as_the_detector_does_offline(running: Running, detector: Detector) -> None:
    begin = time.perf_counter()
    status, content = running.ask("/v1/verdicts?stream=first", {"flows": [flow(0), flow(1)]})
    assert time.perf_counter() - begin < 1
    assert status == 200
    answer = json.loads(content)
    assert (answer["model_version"], answer["threshold"], answer["seen"]) == ("7", detector.limit, 2)
    described = json.loads(running.ask("/v1/model")[1])
    assert described["detector_digest"] == detector.digest
    assert json.loads(running.ask("/v1/openapi.json")[1])["openapi"] == "3.1.0"


@pytest.mark.slow
def test_bentoml_answers_for_health_and_the_service_for_the_rest(running: Running) -> None:
    assert [running.ask(path)[0] for path in ("/livez", "/healthz", "/readyz")] == [200] * 3
    assert b"flowsentry_flows_total" in running.ask("/metrics")[1]
    for path in sorted(schema.HEALTH):
        for method in ("HEAD", "OPTIONS", "POST"):
            with closing(http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=10)) as connection:
                connection.request(method, path)
                is_told = method.lower() in schema.openapi()["paths"][path]
                assert connection.getresponse().status == (200 if is_told else 405)
    for path in ("/", "/docs.json", "/schema.json", "/static_content/x"):
        status, content = running.ask(path)
        assert (status, json.loads(content)["code"]) == (404, "not_found")


@pytest.mark.slow
def test_the_end_of_a_service_is_a_checkpoint_and_its_logs_are_lines_of_json(
    running: Running, detector: Detector
) -> None:
    assert running.ask("/v1/verdicts?stream=last", {"flows": [flow(n) for n in range(5)]})[0] == 200
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0
    streams = Streams(detector, FolderStore(running.home / "state"), Limits())
    try:
        position = streams.status("last")
    finally:
        streams.close()
    assert position is not None
    assert position.seen == position.durable == 5
    lines = [line for line in running.log().splitlines() if line.startswith("{")]
    events = [json.loads(line)["event"] for line in lines]
    assert events.index("ready") < events.index("stopped")
    assert "10.0.0.1" not in running.log()
    assert "Tracking Payload" not in running.log()


@pytest.mark.slow
def test_a_wrong_setting_is_one_line_and_nothing_is_started(code: Path, tmp_path: Path) -> None:
    environment = _environment(code, tmp_path, FLOWSENTRY_SERVICE_FLOWS="many")
    done = subprocess.run(
        [*COMMAND, "--port", "0"], cwd=code, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "[INFO]" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: environment variable FLOWSENTRY_SERVICE_FLOWS")


def test_a_bundle_loads_with_its_version_and_digests(code: Path, detector: Detector) -> None:
    model = Model.load(code)
    assert (model.version, model.digest, model.detector.digest) == ("7", "", detector.digest)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not the code of a bundle"),
        ("[]", "not the code of a bundle"),
        ('{"model_version": "7"}', "not the code of a bundle"),
        ('{"model_version": "7", "detector_digest": "0"}', "not the detector that was bundled"),
    ],
)
def test_a_bundle_of_another_detector_is_refused(
    detector: Detector, tmp_path: Path, content: str | None, reason: str
) -> None:
    detector.save(tmp_path / "detector")
    if content is not None:
        (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(StoreError, match=reason):
        Model.load(tmp_path)
