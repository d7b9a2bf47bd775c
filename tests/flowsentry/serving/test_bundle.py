from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from flowsentry.detector import Detector
from flowsentry.errors import StoreError
from flowsentry.learning.candidates import Recipe, train
from flowsentry.learning.families import FAMILIES
from flowsentry.serving import bundle as bundles
from flowsentry.serving.bundle import Bundle
from flowsentry.serving.local import LocalDeployer
from tests.flowsentry.conftest import Small


@pytest.fixture(scope="module")
def detector(small: Small, recipe: Recipe) -> Detector:
    return train(FAMILIES["effects"], small.views["behaviour"], small.flows, small.splits, recipe).detector


@pytest.fixture(scope="module")
def built(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.build(detector, "3", tmp_path_factory.mktemp("built") / "bundle")


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> Path:
    """One that may be spoilt."""
    shutil.copytree(built.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_bundle_says_what_it_holds(built: Bundle, detector: Detector) -> None:
    manifest = detector.manifest
    assert built.about == {
        "model_version": "3",
        "view": "behaviour",
        "view_version": manifest.version,
        "detector_digest": detector.digest,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    assert Detector.load(built.path / "src" / "detector").digest == detector.digest
    assert bundles.verify(built.path, built.digest) == built


def test_the_same_detector_gives_the_same_digest_and_archive(built: Bundle, detector: Detector, tmp_path: Path) -> None:
    again = bundles.build(detector, "3", tmp_path / "again")
    assert again.digest == built.digest
    for bundle in (built, again):
        bundles.pack(bundle, tmp_path / f"{bundle.path.name}.tar.gz")
    assert (tmp_path / "bundle.tar.gz").read_bytes() == (tmp_path / "again.tar.gz").read_bytes()


def test_its_code_is_what_the_service_imports_and_nothing_of_training(built: Bundle) -> None:
    names = {path.relative_to(built.path / "src").as_posix() for path in (built.path / "src").rglob("*.py")}
    assert {"flowsentry/detector.py", "flowsentry/features/kernel.py", "flowsentry/serving/service.py"} <= names
    unwanted = "simulation|reporting|config|supervisor|local|tracking|search|expectations"
    assert not [name for name in names if re.search(unwanted, name)]
    text = "".join((built.path / "src" / name).read_text() for name in names)
    assert not re.search(r"^\s*(import|from) (zenml|mlflow|tensorflow|great_expectations|evidently|duckdb)", text, re.M)


def test_its_requirements_are_our_lock(built: Bundle) -> None:
    assert (built.path / "env" / "python" / "requirements.txt").read_bytes() == bundles.LOCK.read_bytes()


def test_the_sums_are_checked_without_python(built: Bundle) -> None:
    done = subprocess.run(["sha256sum", "--quiet", "-c", bundles.SUMS], cwd=built.path, check=True, capture_output=True)
    assert done.stdout == b""
    assert hashlib.sha256((built.path / bundles.SUMS).read_bytes()).hexdigest() == built.digest


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "src" / "detector" / "limit.json").write_text("{}"), "detector/limit.json"),
        (lambda f: (f / "src" / "flowsentry" / "detector.py").unlink(), "flowsentry/detector.py"),
        (lambda f: (f / "src" / "sitecustomize.py").write_text(""), "sitecustomize.py"),
        (lambda f: (f / "src" / "link").symlink_to("/etc/passwd"), "link"),
        (lambda f: (f / bundles.SUMS).unlink(), "not a bundle"),
    ],
)
def test_every_change_is_found(copy: Path, spoil: Callable[[Path], object], named: str) -> None:
    spoil(copy)
    with pytest.raises(StoreError, match=named):
        bundles.verify(copy)


def test_another_bundle_is_not_the_one_asked_for(built: Bundle) -> None:
    with pytest.raises(StoreError, match="digest"):
        bundles.verify(built.path, "0" * 64)


def test_what_running_leaves_behind_does_not_count(copy: Path, built: Bundle, tmp_path: Path) -> None:
    (copy / "src" / "flowsentry" / "__pycache__").mkdir()
    (copy / "src" / "flowsentry" / "__pycache__" / "detector.cpython-311.pyc").write_bytes(b"evil")
    assert bundles.verify(copy).digest == built.digest
    bundles.pack(Bundle(copy, built.digest), tmp_path / "b.tar.gz")
    unpacked = bundles.unpack(tmp_path / "b.tar.gz", tmp_path / "unpacked", built.digest)
    assert not list(unpacked.path.rglob("__pycache__"))


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped"),
        member("src/../../escaped"),
        member("/tmp/escaped"),
        member("src\\..\\..\\escaped"),
        member("src/__pycache__/x.nbc"),
        member("link", tarfile.SYMTYPE, 0, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, 0, "first"),
        member("device", tarfile.CHRTYPE, 0),
        member("pipe", tarfile.FIFOTYPE, 0),
        member("first"),
        member("first/below"),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    path = archive(tmp_path / "b.tar.gz", (member("first"), b"x"), (bad, b"x"))
    with pytest.raises(StoreError, match=r"b\.tar\.gz"):
        bundles.unpack(path, tmp_path / "place" / "unpacked")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b.tar.gz", "place"]


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "LARGEST", 1 << 20)
    path = archive(tmp_path / "b.tar.gz", (member("zeros", size=3 << 20), bytes(3 << 20)))
    with pytest.raises(StoreError, match="more than 1 MiB"):
        bundles.unpack(path, tmp_path / "unpacked")
    monkeypatch.setattr(bundles, "MOST", 2)
    path = archive(tmp_path / "c.tar.gz", *((member(str(n)), b"x") for n in range(3)))
    with pytest.raises(StoreError, match="more than 2 files"):
        bundles.unpack(path, tmp_path / "unpacked")


def test_a_header_cannot_fill_the_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "b.tar.gz", "wb") as file:
        file.write(member("x", tarfile.XHDTYPE, 1 << 30).tobuf() + bytes(1 << 20))
    with pytest.raises(StoreError, match="header is too long"):
        bundles.unpack(tmp_path / "b.tar.gz", tmp_path / "unpacked")


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no tar" * 1000)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.tar.gz").write_bytes(content)
    with pytest.raises(StoreError):
        bundles.unpack(tmp_path / "b.tar.gz", tmp_path / "unpacked")


def test_a_cut_off_archive_is_refused(built: Bundle, tmp_path: Path) -> None:
    bundles.pack(built, tmp_path / "b.tar.gz")
    content = (tmp_path / "b.tar.gz").read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError):
        bundles.unpack(tmp_path / "b.tar.gz", tmp_path / "unpacked")


FLOW = {
    "flow_id": "a",
    "src_ip": "192.0.2.1",
    "dst_ip": "192.0.2.2",
    "src_port": 40_000,
    "dst_port": 80,
    "transport": "tcp",
    "bytes": 600,
    "duration": 0,
    "time": "2026-01-01T00:00:00Z",
}


def ask(url: str, body: object = None, token: str | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=10) as answer:
        text = answer.read()
    return cast(dict[str, Any], json.loads(text)) if text.startswith(b"{") else {}


@pytest.mark.slow
def test_bentoml_serves_it_from_anywhere(copy: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"BENTOML_HOME": str(tmp_path / "home"), "FLOWSENTRY_HOME": str(tmp_path / "flowsentry")}
    command = [sys.executable, "-m", "bentoml", "serve", str(copy), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        limit = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < limit, (tmp_path / "log").read_text()
            try:
                ask(f"{url}/readyz")
                break
            except OSError:
                time.sleep(0.1)
        answer = ask(f"{url}/v1/verdicts", {"flows": [FLOW]})
        assert (answer["model_version"], answer["seen"], len(answer["verdicts"])) == ("3", 1, 1)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert bundles.verify(copy)


@pytest.mark.slow
def test_bundles_are_deployed_with_compiled_code_and_streams_go_on(
    built: Bundle, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DEBUG_CACHE", "1")
    other = bundles.build(detector, "4", tmp_path / "other")
    deployer = LocalDeployer(tmp_path / "home", port=0)
    try:
        deployer.start_challenger(built.path, "3", built.digest)
        log = Path(deployer.status().challenger.log)  # type: ignore[union-attr]
        deployer.promote(built.digest, None)
        endpoint = deployer.endpoint()
        assert ask(f"{endpoint.url}/v1/model", token=endpoint.token)["digest"] == built.digest
        verdicts = f"{endpoint.url}/v1/verdicts"
        assert ask(verdicts, {"flows": [FLOW]}, endpoint.token)["seen"] == 1
        deployer.start_challenger(other.path, "4", other.digest)
        deployer.promote(other.digest, built.digest)
        answer = ask(verdicts, {"flows": [FLOW]}, endpoint.token)
        assert (answer["model_version"], answer["seen"]) == ("4", 2)
        deployer.rollback()
        answer = ask(f"{verdicts}?seen=2", {"flows": [FLOW]}, endpoint.token)
        assert (answer["model_version"], answer["seen"]) == ("3", 3)
    finally:
        deployer.stop()
    said = log.read_text()
    assert "[cache] data loaded" in said
    assert "[cache] data saved" not in said
