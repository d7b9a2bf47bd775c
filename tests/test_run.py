from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
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
        (
            (),
            "error: one of the arguments --pipeline --status --schedules --rollback is required; see ",
        ),
        (
            ("--pipeline", "trian"),
            "error: pipeline trian is unknown; did you mean train? Known: train, inference, replay",
        ),
        (("--status", "--rollback"), "error: argument --rollback: not allowed with argument --status; see"),
        (("--status", "--data", "a.csv"), "error: --data goes with --pipeline only; see python run.py --help"),
        (("--rollback", "--no-cache"), "error: --no-cache goes with --pipeline only; see python run.py --help"),
        (
            ("--pipeline", "train", "--model-version", "3"),
            "error: --model-version goes with --pipeline inference only; see python run.py --help",
        ),
        (
            ("--pipeline", "inference", "--schedule", "*/30 * * * *"),
            "error: schedules are CronJobs: add --stack cluster; on this machine cron does it, for example: */30 * * *",
        ),
        (("--schedules",), "error: schedules are CronJobs: add --stack cluster; on this machine cron does it"),
        (
            ("--pipeline", "inference", "--stack", "cluster", "--schedule", "hourly"),
            "error: --schedule should have five fields, such as '*/30 * * * *', not 'hourly'",
        ),
        (
            ("--pipeline", "train", "--stack", "cluster", "--schedule", "*/30 * * * *"),
            "error: --schedule is for pipelines that watch, not for train; see",
        ),
        (("--status", "--schedule", "off"), "error: --schedule goes with --pipeline only; see"),
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


def test_a_folder_whose_name_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text('reports: "re\\0ports"\n')
    status, line = refused(capsys, "--pipeline", "train", "--config", str(config))
    assert status == 2
    assert line == r"error: 're\x00ports': reports cannot be written there: embedded null byte"


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
    options = ("--stack", "--config", "--data", "--no-cache", "--model-version", "--status", "--rollback")
    options += ("--schedule", "--schedules")
    for word in ("--pipeline", *options, *run.PIPELINES):
        assert word in done.stdout


@pytest.mark.slow
def test_an_unknown_stack_is_an_error_and_no_other_stack_is_taken(tmp_path: Path) -> None:
    done = start(tmp_path, "--pipeline", "train", "--stack", "clutser")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: stack clutser is unknown; did you mean cluster? Known: cluster, local"]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line_and_no_other_stack_is_taken(tmp_path: Path) -> None:
    site = {"CONTEXT": "nowhere", "HOST": "127.0.0.1", "REGISTRY": "127.0.0.1:1", "TAG": "1"}
    given = {f"FLOWSENTRY_SITE_{key}": value for key, value in site.items()}
    done = start(tmp_path, "--pipeline", "train", "--stack", "cluster", **given)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: context nowhere: ")
    assert "set KUBECONFIG" in line
    assert not (tmp_path / "zenml").exists(), "ZenML was not even asked"


@pytest.mark.slow
def test_a_folder_that_zenml_cannot_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = start(tmp_path, "--pipeline", "train", ZENML_CONFIG_PATH=str(tmp_path / "file" / "zenml"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ZenML cannot use its folder")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_flows_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, "--pipeline", "train", "--data", "missing.csv")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == ["error: missing.csv does not exist; check the path given with --data"]


HEADER = (
    "_source_flow_id,_source_flow_final,_source_source_ip,_source_destination_ip,_source_network_bytes,"
    "_source_network_transport,_source_@timestamp,_source_event_duration,_source_destination_port,"
    "_source_source_port,label\n"
)
ROW = "a,True,10.0.0.1,10.0.0.2,421,tcp,2022-02-25T12:19:30.013Z,126359,8500.0,43226.0,benign\n"
BIG = HEADER + "".join(ROW.replace("a,", f"{number},", 1) for number in range(20_000))
"""More than is looked at before the run begins."""
EVENT = {
    "@timestamp": "2022-02-25T12:19:30.013Z",
    "flow": {"id": "a", "final": True},
    "source": {"ip": "10.0.0.1", "port": 43226},
    "destination": {"ip": "10.0.0.2", "port": 8500},
    "network": {"bytes": 421, "transport": "tcp"},
    "event": {"duration": 126359},
}


def parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def noise(size: int) -> bytes:
    return bytes(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


BAD: dict[str, tuple[dict[str, str | bytes], list[str], str]] = {
    # what is there, what is asked for, what the line says
    "missing file": ({}, ["absent.csv"], "absent.csv does not exist; check the path"),
    "missing folder": ({}, ["absent/"], "absent does not exist; check the path"),
    "no match": ({}, ["*.parquet"], "*.parquet matches no file; check the pattern"),
    "folder without data": ({"sub/.keep": ""}, ["sub"], "sub has no file with flows; put CSV, NDJSON or Parquet"),
    "empty file": ({"x.csv": ""}, ["x.csv"], "x.csv is empty; give a file with flows"),
    "empty gzip": ({"x.csv.gz": gzip.compress(b"")}, ["x.csv.gz"], "x.csv.gz is empty inside its gzip"),
    "header only": ({"x.csv": HEADER}, ["x.csv"], "x.csv has a header but no rows"),
    "header and blank lines": ({"x.csv": HEADER + "\n \n"}, ["x.csv"], "x.csv has a header but no rows"),
    "wrong columns": (
        {"x.csv": (HEADER + ROW).replace("_source_network_bytes", "_source_network_byte")},
        ["x.csv"],
        "missing _source_network_bytes (nearest found: _source_network_byte); rename or add them",
    ),
    "not a table": ({"x.csv": "hello\nworld\n"}, ["x.csv"], "x.csv"),
    "binary garbage": ({"x.csv": noise(5000)}, ["x.csv"], "x.csv is binary, neither CSV, NDJSON, gzip nor Parquet"),
    "garbage that says gzip": ({"x.gz": b"\x1f\x8b" + noise(5000)}, ["x.gz"], "x.gz is a damaged or truncated gzip"),
    "truncated gzip": (
        {"x.csv.gz": gzip.compress((HEADER + ROW * 50).encode())[:-12]},
        ["x.csv.gz"],
        "x.csv.gz is a damaged or truncated gzip file",
    ),
    "gzip truncated far behind": (
        {"x.csv.gz": gzip.compress(BIG.encode())[:-2000]},
        ["x.csv.gz"],
        "x.csv.gz is a damaged or truncated gzip file",
    ),
    "gzip altered far behind": (
        {"x.csv.gz": gzip.compress(BIG.encode())[:-8] + b"12345678"},
        ["x.csv.gz"],
        "x.csv.gz is a damaged or truncated gzip file",
    ),
    "not UTF-8": ({"x.csv": HEADER.encode() + b"\xe9" + ROW.encode()}, ["x.csv"], "x.csv is not UTF-8: byte 0xe9 in"),
    "not UTF-8 far behind": (
        {"x.csv": BIG.encode() + b"\xe9" + ROW.encode()},
        ["x.csv"],
        "x.csv is not UTF-8: byte 0xe9 in line 20002",
    ),
    "huge field in the header": ({"x.csv": "a" * (2 << 20)}, ["x.csv"], "line 1 is longer than 1 MiB"),
    "huge field": ({"x.csv": HEADER + ROW + "a" * (2 << 20) + ROW}, ["x.csv"], "line 3 is longer than 1 MiB"),
    "mixed layouts": (
        {"mix/a.csv": HEADER + ROW, "mix/b.ndjson": json.dumps(EVENT) + "\n"},
        ["mix"],
        "mix",
    ),
    "one file twice": ({"x.csv": HEADER + ROW}, ["x.csv", "./x.csv"], "is given twice; name every file once"),
    "JSON but no events": ({"x.json": json.dumps({"a": 1})}, ["x.json"], "x.json"),
    "bad Parquet": ({"x.parquet": b"PAR1" + noise(500)}, ["x.parquet"], "x.parquet is a damaged Parquet file"),
    "truncated Parquet": (
        {"x.parquet": parquet(pd.DataFrame({"a": range(1000)}))[:-100]},
        ["x.parquet"],
        "x.parquet is a damaged Parquet file",
    ),
    "Parquet of something else": ({"x.parquet": parquet(pd.DataFrame({"a": [1]}))}, ["x.parquet"], "x.parquet"),
    "Parquet without rows": (
        {"x.parquet": parquet(pd.DataFrame(columns=HEADER.strip().split(","), dtype=str))},
        ["x.parquet"],
        "x.parquet has columns but no rows",
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)")
@pytest.mark.parametrize("name", BAD)
def test_bad_flows_are_one_line_that_names_them(
    name: str, isolated_zenml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, data, expected = BAD[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    status = run.main(["--pipeline", "train", "--data", *data])
    out, err = capsys.readouterr()
    assert status == 1
    assert "Traceback" not in out + err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not list(Path("reports").iterdir()), "a run that read nothing has no pages"
