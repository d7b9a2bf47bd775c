"""What the benchmarks measure on: the real recording where it is, and repetitions of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from flowsentry.flows import schema, sources
from flowsentry.simulation import SimulationSettings, simulate

DEFAULT = (
    Path(os.environ.get("FLOWSENTRY_REAL_DATA", Path(__file__).resolve().parents[1] / "data"))
    / "elastic_february2022_flows.csv.gz"
)


def recording(path: Path) -> pd.DataFrame:
    """The reports of a file; simulated ones, and a line that says so, where it is missing."""
    if path.exists():
        return sources.read([path]).reports
    print(f"{path.name} is not here: measured on simulated flows")
    return simulate(SimulationSettings(scale=1.0))


def repeated(reports: pd.DataFrame, copies: int, reports_per_flow: float, seed: int = 0) -> pd.DataFrame:
    """The recording `copies` times, one after the other, each flow reported `reports_per_flow` times on average."""
    span = reports["time"].max() - reports["time"].min() + pd.Timedelta(minutes=1)
    generator = np.random.default_rng(seed)
    parts = []
    for copy in range(copies):
        times = generator.poisson(reports_per_flow - 1, len(reports)) + 1
        place = np.repeat(np.arange(len(reports)), times)
        number = np.arange(len(place)) - np.repeat(np.cumsum(times) - times, times)
        part = reports.iloc[place].reset_index(drop=True)
        share = (number + 1) / times[place]
        part["bytes"] = (part["bytes"] * share).astype("int64")
        part["duration"] = (part["duration"] * share).astype("int64")
        part["final"] = number + 1 == times[place]
        part["flow_id"] = part["flow_id"] + f"-{copy}"
        part["time"] = part["time"] + copy * span + pd.to_timedelta(10 * number, unit="s")
        parts.append(part)
    table = pd.concat(parts, ignore_index=True).sort_values("time", kind="stable", ignore_index=True)
    table["row"] = np.arange(len(table)) + 1
    return schema.conform(table)


def write_published(reports: pd.DataFrame, path: Path) -> None:
    """The published CSV layout."""
    names = {
        "flow_id": "_source_flow_id",
        "final": "_source_flow_final",
        "src_ip": "_source_source_ip",
        "dst_ip": "_source_destination_ip",
        "bytes": "_source_network_bytes",
        "transport": "_source_network_transport",
        "time": "_source_@timestamp",
        "duration": "_source_event_duration",
        "dst_port": "_source_destination_port",
        "src_port": "_source_source_port",
        "label": "label",
    }
    table = reports[list(names)].rename(columns=names)
    table["_source_@timestamp"] = table["_source_@timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%S.%f").str[:-3] + "Z"
    table.to_csv(path, index=False)
