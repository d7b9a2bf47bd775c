from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowsentry import telemetry
from flowsentry.errors import ConfigError, StackError
from flowsentry.serving import bundle as bundles
from stacks import images, site

if TYPE_CHECKING:
    from tests.conftest import Cluster

DOCKER = site.ROOT / "docker"
NAME = "registry.example.org/team/flowsentry-serving:1"


def stages() -> dict[str, str]:
    """The text of every stage of the Dockerfile, without comments, lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (DOCKER / "Dockerfile").read_text()).replace("\\\n", " ")
    parts = re.split(r"(?m)^FROM (\S+) AS (\S+)$", text)
    assert not parts[0].strip()
    return {name: body for name, body in zip(parts[2::3], parts[3::3], strict=True)}


def test_there_are_two_images_over_one_environment() -> None:
    assert list(stages()) == ["environment", *images.TARGETS]


def test_nothing_names_an_index() -> None:
    paths = [path for path in DOCKER.iterdir() if path.is_file()]
    for path in [*paths, *(site.ROOT / "requirements").glob("*.txt")]:
        assert not re.search(r"://|--index|--extra-index|--find-links|(PIP|UV)_\w+|trusted-host", path.read_text()), (
            path
        )


@pytest.mark.parametrize("target", images.TARGETS)
def test_an_image_does_not_run_as_root(target: str) -> None:
    assert re.findall(r"(?m)^USER (.*)$", stages()[target]) == ["1000:1000"]


@pytest.mark.parametrize("target", images.TARGETS)
def test_an_image_says_what_it_is(target: str) -> None:
    labels = re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', stages()[target])
    assert [name for name, _ in labels] == ["title", "version", "licenses"]


def test_everything_is_installed_by_hash_and_serving_has_only_its_own_lock() -> None:
    text = stages()
    installs = re.findall(r"pip install .*?\.txt", " ".join(text.values()))
    assert len(installs) == 4
    assert all("--require-hashes" in install for install in installs)
    assert "runtime" not in text["environment"] + text["serving"]


def test_libraries_of_an_image_send_nothing() -> None:
    for name, value in telemetry.OFF.items():
        assert re.search(rf"\s{name}={value}\s", stages()["environment"]), name


def test_what_is_sent_to_the_builder_is_just_what_is_needed() -> None:
    compiled = ast.parse((DOCKER / "compile.py").read_text())
    own = {"flowsentry.serving.fetch", "flowsentry.serving.drain"}
    entries = {*own, *filter(lambda name: name.startswith("flowsentry"), imported(compiled))}
    code = {path for entry in entries for path in bundles.modules(entry)}
    docker = {path for path in DOCKER.iterdir() if path.is_file()}
    locks = {site.ROOT / "requirements" / f"{name}.txt" for name in ("runtime", "serving", "uv")}
    sent = {site.ROOT / name for name in site.image_inputs()}
    assert sent == {site.ROOT / ".dockerignore"} | code | docker | locks


def imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if site.ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file() else node.module


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with what images are made from."""
    for name in site.image_inputs():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site.ROOT / name, tmp_path / name)
    monkeypatch.setattr(site, "ROOT", tmp_path)
    return tmp_path


def test_the_tag_changes_with_what_goes_in_and_only_then(copy: Path) -> None:
    before = site.image_tag()
    assert re.fullmatch("[0-9a-f]{12}", before)
    (copy / "steps").mkdir()
    (copy / "steps" / "load.py").write_text("changed")
    (copy / "requirements" / "dev.txt").write_text("changed")
    assert site.image_tag() == before
    tags = {before}
    for name in site.image_inputs():
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b"\n")
        tags.add(site.image_tag())
        (copy / name).write_bytes(content)
    assert len(tags) == 1 + len(site.image_inputs())
    assert site.image_tag() == before


def test_a_missing_input_is_named(copy: Path) -> None:
    (copy / "requirements" / "serving.txt").unlink()
    with pytest.raises(ConfigError, match=r"requirements/serving\.txt"):
        site.image_tag()


Engine = Callable[[str], Path]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Puts a `docker` on the path that writes down what it is asked; gives the file."""
    log = tmp_path / "asked.txt"

    def put(script: str) -> Path:
        program = tmp_path / "bin" / "docker"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return log

    return put


def test_what_the_registry_has_is_not_built(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    log = engine("""echo '{"layers": [{"size": 1000000}, {"size": 2000000}]}'""")
    assert not images.ensure("serving", NAME)
    assert log.read_text() == f"manifest inspect {NAME}\n"
    assert "3 MB to pull" in capsys.readouterr().out


@pytest.mark.parametrize("again", [False, True])
def test_what_is_missing_or_named_by_hand_is_built_and_pushed(engine: Engine, again: bool) -> None:
    log = engine("case $1 in manifest) exit 1 ;; image) echo 900000000 ;; esac")
    assert images.ensure("serving", NAME, again=again)
    build = next(line for line in log.read_text().splitlines() if line.startswith("build"))
    assert f"--target serving --tag {NAME} " in build
    assert build.endswith(f" {site.ROOT}")
    assert [line.split()[0] for line in log.read_text().splitlines()] == [
        *(() if again else ("manifest",)),
        *("build", "push", "image", "manifest"),
    ]


def test_an_engine_that_fails_is_quoted(engine: Engine) -> None:
    engine("case $1 in build) echo step 3: no space left >&2; exit 1 ;; *) exit 1 ;; esac")
    with pytest.raises(StackError, match=r"docker build failed:\nstep 3: no space left"):
        images.ensure("serving", NAME)


def test_without_an_engine_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match="docker, which is not installed"):
        images.ensure("serving", NAME)


def test_only_registries_of_this_machine_are_asked_without_encryption(engine: Engine) -> None:
    log = engine("exit 1")
    for registry in ("127.0.0.1:5000", "localhost:5001", "[::1]:5000", "localhost.example.org", "10.0.0.1:5000"):
        images._manifest(f"{registry}/a:1")
    assert [" --insecure " in line for line in log.read_text().splitlines()] == [True, True, True, False, False]


def make_images(cluster: Cluster) -> str:
    """What `make images` says on this cluster."""
    if shutil.which("docker") is None:
        pytest.skip("no docker to build images with")
    given = {"CONTEXT": "test", "HOST": cluster.host, "REGISTRY": cluster.registry}
    environment = {**os.environ, **{f"FLOWSENTRY_SITE_{key}": value for key, value in given.items()}}
    command = [sys.executable, "-m", "stacks.images"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=site.ROOT, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.cluster
@pytest.mark.slow
def test_a_second_run_builds_nothing(cluster: Cluster) -> None:
    make_images(cluster)
    said = make_images(cluster).splitlines()
    tag = site.image_tag()
    for line, target in zip(said, images.TARGETS, strict=True):
        assert line.startswith(f"{cluster.registry}/flowsentry-{target}:{tag} is in the registry (")
    assert int(re.findall(r"(\d+) MB to pull", said[0])[0]) < 500
