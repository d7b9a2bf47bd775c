"""Simulated recordings as files: with truth as Parquet, as a meter or a publisher would give them otherwise."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from flowsentry.errors import ConfigError

PUBLISHED: Final = {
    "_source_flow_id": "flow_id",
    "_source_flow_final": "final",
    "_source_source_ip": "src_ip",
    "_source_destination_ip": "dst_ip",
    "_source_network_bytes": "bytes",
    "_source_network_transport": "transport",
    "_source_@timestamp": "time",
    "_source_event_duration": "duration",
    "_source_destination_port": "dst_port",
    "_source_source_port": "src_port",
    "label": "label",
}
"""Columns of the published AssureMOSS February 2022 file, in its order, and what they are called here."""


def write(reports: pd.DataFrame, path: Path) -> None:
    """Write simulated reports; the end of the file's name says how.

    `.parquet`: the canonical columns with truth. `.csv.gz`: the published layout. `.ndjson`: Packetbeat flow events,
    with packets, bytes by direction and workloads, and the label as a field of its own.

    Args:
        reports: as `simulate` gives them.
        path: file to write; an older one is replaced.

    Raises:
        ConfigError: another ending, or the file cannot be written.
    """
    for ending, save in WRITERS.items():
        if path.name.endswith(ending):
            try:
                save(reports, path)
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be written: {error.strerror or error}; choose another --out"
                ) from error
            return
    raise ConfigError(f"{path}: unknown kind of file; end its name with {', '.join(WRITERS)}")


def _write_parquet(reports: pd.DataFrame, path: Path) -> None:
    reports.to_parquet(path, index=False)


def _write_published(reports: pd.DataFrame, path: Path) -> None:
    columns = {theirs: reports[ours] for theirs, ours in PUBLISHED.items()}
    columns["_source_@timestamp"] = pd.Series(_moments(reports["time"], "ms"))
    for name in ("_source_source_port", "_source_destination_port"):
        columns[name] = columns[name].astype("Float64")
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        pd.DataFrame(columns).to_csv(io.TextIOWrapper(packed, "utf-8", newline=""), index=False, lineterminator="\n")


def _write_packetbeat(reports: pd.DataFrame, path: Path) -> None:
    values = {str(name): reports[name].tolist() for name in reports if name not in ("time", "start", "end")}
    values["time"] = _moments(reports["time"], "ms").tolist()
    for name in ("start", "end"):
        values[name] = _moments(reports[name], "us").tolist()
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        for row in range(len(reports)):
            event = _event({name: column[row] for name, column in values.items()})
            lines.write(json.dumps(event, separators=(",", ":")) + "\n")


def _event(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in the Elastic Common Schema, as Packetbeat writes it."""
    return {
        "@timestamp": report["time"],
        "type": "flow",
        "event": {
            "kind": "event",
            "action": "network_flow",
            "dataset": "flow",
            "start": report["start"],
            "end": report["end"],
            "duration": report["duration"],
        },
        "flow": {"id": report["flow_id"], "final": report["final"]},
        "source": _end(report, "src"),
        "destination": _end(report, "dst"),
        "network": {"transport": report["transport"], "bytes": report["bytes"], "packets": report["packets"]},
        "label": report["label"],
    }


def _end(report: Mapping[str, Any], side: str) -> dict[str, Any]:
    end = {field: report[f"{side}_{field}"] for field in ("ip", "port", "bytes", "packets")}
    if isinstance(workload := report[f"{side}_workload"], str):
        namespace, name = workload.split("/")
        end["kubernetes"] = {"namespace": namespace, "deployment": {"name": name}}
    return end


def _moments(times: pd.Series, unit: str) -> np.ndarray:
    """Times as Packetbeat writes them, in UTC."""
    utc = times.dt.tz_localize(None).to_numpy(f"datetime64[{unit}]")
    text: np.ndarray = np.datetime_as_string(utc, timezone="UTC")
    return text


WRITERS: Final[Mapping[str, Callable[[pd.DataFrame, Path], None]]] = {
    ".parquet": _write_parquet,
    ".csv.gz": _write_published,
    ".ndjson": _write_packetbeat,
}
