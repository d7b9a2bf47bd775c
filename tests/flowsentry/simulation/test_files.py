from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd
import pytest

from flowsentry.errors import ConfigError
from flowsentry.flows import sources
from flowsentry.simulation import SimulationSettings, command, simulate

SETTINGS = ["--seed", "5", "--minutes", "40", "--scale", "0.05"]
PUBLISHED = ["flow_id", "final", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "time"]
PUBLISHED += ["duration", "label"]
TRUTH = {"family", "group", "exchange", "episode", "role", "hard_negative"}


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def reports() -> pd.DataFrame:
    return simulate(SimulationSettings(seed=5, minutes=40, scale=0.05))


def same(ours: pd.DataFrame, theirs: pd.DataFrame, columns: list[str]) -> None:
    for name in columns:
        mine, read = ours[name], theirs[name]
        if mine.dtype == "category":
            mine, read = mine.astype(object), read.astype(object)
        pd.testing.assert_series_equal(mine, read, check_names=False)


def test_the_published_layout_reads_back_as_the_same_reports_without_truth(
    tmp_path: Path, reports: pd.DataFrame
) -> None:
    run("--out", str(tmp_path / "made.csv.gz"), *SETTINGS)
    loaded = sources.read([str(tmp_path / "made.csv.gz")])
    assert loaded.quarantine.empty
    same(reports, loaded.reports, PUBLISHED)
    assert TRUTH.isdisjoint(loaded.reports)


def test_packetbeat_events_read_back_with_packets_directions_and_workloads(
    tmp_path: Path, reports: pd.DataFrame
) -> None:
    run("--out", str(tmp_path / "made.ndjson"), *SETTINGS)
    loaded = sources.read([str(tmp_path / "made.ndjson")])
    assert loaded.quarantine.empty
    more = [f"{side}_{what}" for side in ("src", "dst") for what in ("bytes", "packets", "workload")]
    same(reports, loaded.reports, [*PUBLISHED, "packets", "start", "end", *more])
    assert TRUTH.isdisjoint(loaded.reports)


def test_parquet_keeps_the_truth(tmp_path: Path, reports: pd.DataFrame) -> None:
    run("--out", str(tmp_path / "made.parquet"), *SETTINGS)
    loaded = sources.read([str(tmp_path / "made.parquet")])
    same(reports, loaded.reports, [*PUBLISHED, *sorted(TRUTH)])


@pytest.mark.parametrize("ending", ["csv.gz", "ndjson", "parquet"])
def test_equal_seeds_write_equal_files(tmp_path: Path, ending: str) -> None:
    written = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{ending}"
        run("--out", str(path), *SETTINGS)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_what_was_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], reports: pd.DataFrame) -> None:
    run("--out", str(tmp_path / "made.parquet"), *SETTINGS)
    assert f"{len(reports):,} reports" in capsys.readouterr().out


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made\.xlsx: unknown kind of file.*\.ndjson"):
        run("--out", str(tmp_path / "made.xlsx"), *SETTINGS)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/made\.ndjson cannot be written"):
        run("--out", str(tmp_path / "missing" / "made.ndjson"), *SETTINGS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_closed_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        run("--out", str(tmp_path / "made.parquet"), *SETTINGS)


def test_a_setting_out_of_range_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--minutes 5: .*greater than or equal to 40"):
        run("--out", str(tmp_path / "made.parquet"), "--minutes", "5")
