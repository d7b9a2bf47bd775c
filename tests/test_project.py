from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WANTED = {
    "runtime": PROJECT["dependencies"],
    "dev": PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"],
}


def locked(name: str, python: str) -> dict[str, str]:
    """The version of everything that this Python gets, by name; everything is locked at most once."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    machine = default_environment() | {"python_full_version": python, "python_version": python[:4]}
    versions: dict[str, str] = {}
    for line in re.sub(r"\s*\\\n\s*--hash=\S+", "", text).splitlines():
        entry = Requirement(line)
        if entry.marker is None or entry.marker.evaluate(machine):
            (specifier,) = entry.specifier
            assert specifier.operator == "=="
            assert canonicalize_name(entry.name) not in versions
            versions[canonicalize_name(entry.name)] = specifier.version
    return versions


@pytest.mark.parametrize("python", ["3.11.9", "3.12.9"])
@pytest.mark.parametrize("name", WANTED)
def test_the_lock_keeps_what_the_project_asks_for(name: str, python: str) -> None:
    versions = locked(name, python)
    for wanted in map(Requirement, WANTED[name]):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), f"{wanted}: make lock"


@pytest.mark.parametrize("name", [*WANTED, "uv"])
def test_the_lock_has_a_hash_for_everything_and_no_address(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|--index|--find-links| @ ", text)


@pytest.mark.parametrize("python", ["3.11.9", "3.12.9"])
def test_what_is_installed_for_people_is_what_is_tested(python: str) -> None:
    assert locked("runtime", python).items() <= locked("dev", python).items()


def test_ci_takes_real_flows_from_beside_the_repository_unless_told_where(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / ".ci", repository / ".ci")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text('#!/bin/sh\necho "$* with ${FLOWSENTRY_REAL_DATA-nothing}"\n')
    make.chmod(0o755)

    def told(**environment: str) -> str:
        search = {"PATH": f"{make.parent}:/usr/bin:/bin"}
        done = subprocess.run([repository / ".ci" / "run"], env=search | environment, capture_output=True, check=True)
        return done.stdout.decode().strip()

    assert told() == "test with nothing"
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert told() == f"test with {tmp_path}/shared/data"
    assert told(FLOWSENTRY_REAL_DATA="elsewhere") == "test with elsewhere"
