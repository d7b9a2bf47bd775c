from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flowsentry.errors import ConfigError, FlowSentryError, StoreError
from flowsentry.serving import bundle as bundles
from flowsentry.serving.bundle import PACKAGE, Bundle
from flowsentry.serving.fetch import fetch


def make(folder: Path, version: str) -> Bundle:
    """A bundle in form, with one module of ours."""
    module = folder / "src" / "flowsentry" / "errors.py"
    module.parent.mkdir(parents=True)
    shutil.copyfile(PACKAGE / "errors.py", module)
    (folder / "src" / "bundle.json").write_text(f'{{"model_version": "{version}"}}')
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in paths)
    (folder / bundles.SUMS).write_text("".join(lines))
    return bundles.verify(folder)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[str, str]:
    """Address of an archive, and its digest."""
    bundle = make(tmp_path / "made" / "3", "3")
    (tmp_path / "store").mkdir()
    bundles.pack(bundle, archive := tmp_path / "store" / f"{bundle.digest}.tar.gz")
    return str(archive), bundle.digest


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "pod" / "served"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_bundle_is_brought_whole(stored: tuple[str, str], target: Path, scheme: str) -> None:
    url, digest = stored
    assert fetch(scheme + url, digest, target) == Bundle(target, digest)
    assert bundles.verify(target, digest).about == {"model_version": "3"}
    assert [path.name for path in target.parent.iterdir()] == ["served"]


def test_what_is_there_is_not_fetched_again(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    fetch(url, digest, target)
    Path(url).unlink()
    assert fetch(url, digest, target) == Bundle(target, digest)


def test_what_a_killed_run_or_another_model_left_is_replaced(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    make(target, "2")
    assert fetch(url, digest, target).about == {"model_version": "3"}
    (target / "src" / "bundle.json").write_text("{")
    (target / "src" / "more.py").write_text("")
    fetch(url, digest, target)
    assert bundles.verify(target, digest) == Bundle(target, digest)


def test_machine_code_of_equal_sources_comes_with_it(
    stored: tuple[str, str], target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "image" / "flowsentry"
    (package / "__pycache__").mkdir(parents=True)
    shutil.copyfile(PACKAGE / "errors.py", package / "errors.py")
    (package / "__pycache__" / "errors.f-1.py311.nbi").write_bytes(b"machine code")
    monkeypatch.setattr(bundles, "PACKAGE", package)
    fetch(*stored, target)
    copy = target / "src" / "flowsentry" / "__pycache__" / "errors.f-1.py311.nbi"
    assert copy.read_bytes() == b"machine code"
    assert bundles.verify(target, stored[1]) == Bundle(target, stored[1])


def refused(url: str, digest: str, target: Path, **options: int) -> FlowSentryError:
    with pytest.raises((StoreError, ConfigError)) as caught:
        fetch(url, digest, target, **options)
    assert not target.exists()
    assert not target.parent.exists() or not list(target.parent.iterdir())
    return caught.value


def test_what_is_not_the_bundle_leaves_nothing(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    assert "digest" in str(refused(url, "0" * 64, target))
    assert "no such bundle" in str(refused(url.replace(digest, "0" * 64), digest, target))
    assert "larger than" in str(refused(url, digest, target, largest=Path(url).stat().st_size - 1))
    Path(url).write_bytes(Path(url).read_bytes()[:-40])
    assert "not a bundle" in str(refused(url, digest, target))


def test_an_archive_of_just_the_largest_size_is_taken(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    assert fetch(url, digest, target, largest=Path(url).stat().st_size).digest == digest


def test_impossible_addresses_and_digests_are_refused(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    assert "64 digits" in str(refused(url, digest[:12], target))
    assert "secret-1" not in str(refused("s3://key:secret-1@bucket/a.tar.gz", digest, target))
    assert "reached" in str(refused("nowhere://bucket/a.tar.gz", digest, target))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowsentry.serving.fetch", *arguments],
        capture_output=True, text=True, check=False, timeout=120, cwd=PACKAGE.parent, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_command_says_in_one_line_what_it_did(stored: tuple[str, str], target: Path) -> None:
    url, digest = stored
    done = run(url, digest, str(target))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"model version 3, bundle {digest[:12]}, is in {target}\n"


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_one_line_and_a_failure(stored: tuple[str, str], target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run(
        "s3://bundles/a.tar.gz", stored[1], str(target),
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret-1",
        AWS_DEFAULT_REGION="us-east-1",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://bundles/a.tar.gz: cannot be fetched: ")
    assert done.stderr.count("\n") == 1
    assert "secret-1" not in done.stderr
    assert not target.exists()
