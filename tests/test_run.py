from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and the one line of an error."""
    status = run.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return status, line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "error: the following arguments are required: --pipeline; see python run.py --help"),
        (("--pipeline", "trian"), "error: pipeline trian is unknown; did you mean train? Known: train"),
        (("--pipeline", "train", "--stak", "x"), "error: unrecognized arguments: --stak x; see python run.py --help"),
        (("--pipeline", "train", "--data"), "error: argument --data: expected at least one argument;"),
        (("--pipeline", "train", "--data", "simulate", "a.csv"), "error: --data should be either simulate or a list"),
        (("--pipeline", "train", "--config", "configs/trian.yaml"), "error: configs/trian.yaml: there is no such file"),
    ],
)
def test_an_impossible_request_is_one_line_and_status_2(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status, line = refused(capsys, *arguments)
    assert status == 2
    assert line.startswith(expected)


def test_a_mistake_in_a_config_is_found_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("search:\n  fold: 3\n")
    status, line = refused(capsys, "--pipeline", "train", "--config", str(config))
    assert status == 2
    assert line == f"error: {config}:2: search.fold is no key of this file; did you mean search.folds?"


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "mine.yaml"
    config.write_text(f"reports: {tmp_path}/file/reports\n")
    status, line = refused(capsys, "--pipeline", "train", "--config", str(config))
    assert status == 2
    assert line == f"error: {tmp_path}/file/reports: reports cannot be written there: Not a directory"


def start(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """run.py as a user starts it, in an empty folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        check=False,
        cwd=tmp_path,
        env=kept | {"HOME": str(tmp_path), "ZENML_CONFIG_PATH": str(tmp_path / "zenml")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_names_every_option_and_pipeline(tmp_path: Path) -> None:
    done = start(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("--pipeline", "--stack", "--config", "--data", "--no-cache", *run.PIPELINES):
        assert word in done.stdout


@pytest.mark.slow
def test_an_unknown_stack_is_an_error_and_no_other_stack_is_taken(tmp_path: Path) -> None:
    done = start(tmp_path, "--pipeline", "train", "--stack", "clutser")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: stack clutser is unknown; Known: local"]


@pytest.mark.slow
def test_a_folder_that_zenml_cannot_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = start(tmp_path, "--pipeline", "train", ZENML_CONFIG_PATH=str(tmp_path / "file" / "zenml"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ZenML cannot use its folder")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing.csv", "empty.csv"])
def test_flows_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.csv").touch()
    done = start(tmp_path, "--pipeline", "train", "--data", name)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert name in line
