from __future__ import annotations

import re
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


def locked(name: str) -> dict[str, Requirement]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    lines = re.sub(r"\s*\\\n\s*--hash=\S+", "", text).splitlines()
    return {canonicalize_name(entry.name): entry for entry in map(Requirement, lines)}


@pytest.mark.parametrize("name", WANTED)
def test_the_lock_keeps_what_the_project_asks_for(name: str) -> None:
    entries = locked(name)
    for wanted in map(Requirement, WANTED[name]):
        (specifier,) = entries[canonicalize_name(wanted.name)].specifier
        assert specifier.operator == "=="
        assert wanted.specifier.contains(specifier.version), f"{wanted}: make lock"


@pytest.mark.parametrize("name", [*WANTED, "uv"])
def test_the_lock_has_a_hash_for_everything_and_no_address(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|--index|--find-links| @ ", text)


def test_what_is_installed_for_people_is_what_is_tested() -> None:
    development = locked("dev")
    for name, entry in locked("runtime").items():
        assert development[name].specifier == entry.specifier


@pytest.mark.parametrize("python", ["3.11.9", "3.12.9"])
def test_every_entry_of_the_lock_is_meant_for_some_supported_machine(python: str) -> None:
    machine = default_environment() | {"python_full_version": python, "python_version": python[:4]}
    wanted = {canonicalize_name(Requirement(line).name) for line in WANTED["dev"]}
    for name, entry in locked("dev").items():
        if name in wanted:
            assert entry.marker is None or entry.marker.evaluate(machine)
