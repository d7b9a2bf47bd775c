"""The commands that the README shows are run.

Those are lines that begin with `$ ` in a block marked `console`. Each runs in the repository's folder, with a home of
its own and with this Python in front. A comment before the block may say `slow: why` or `not run: why`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowsentry.serving.local import LocalDeployer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>slow|not run): (?P<why>[^\n]+) -->\n)?^```console\n(?P<lines>.*?)^```$", re.M | re.S
)
MINUTES = 15


def commands(readme: str) -> list[object]:
    found: list[object] = []
    for block in BLOCK.finditer(readme):
        marks = {
            "slow": [pytest.mark.slow],
            "not run": [pytest.mark.skip(reason=block["why"])],
        }.get(block["mark"] or "", [])
        lines = [line.removeprefix("$ ") for line in block["lines"].splitlines() if line.startswith("$ ")]
        found += [pytest.param(line, marks=marks, id=line) for line in lines]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of one user who reads from top to bottom; whatever was deployed is stopped in the end."""
    home = tmp_path_factory.mktemp("reader")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ZENML_", "MLFLOW_"))}
    try:
        yield kept | {
            "HOME": str(home),
            "ZENML_CONFIG_PATH": str(home / "zenml"),
            "FLOWSENTRY_HOME": str(home / "flowsentry"),
            "FLOWSENTRY_PORT": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    finally:
        LocalDeployer(home / "flowsentry").stop()


@pytest.mark.parametrize("command", commands(README))
def test_a_command_of_the_readme_runs(command: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()


def test_every_command_of_the_readme_is_found() -> None:
    assert len(commands(README)) == len(re.findall(r"^\$ ", README, re.M)) > 0


@pytest.mark.parametrize(
    "path", sorted({*re.findall(r"\]\(([^):]+)\)", README), *re.findall(r"`([a-z]+/[\w./]+)`", README)})
)
def test_a_file_that_the_readme_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()
