"""Small hand-made tables for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from flowsentry.flows import schema

START = pd.Timestamp("2024-03-01T00:00:00Z")


def make_reports(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Canonical reports from partial rows; `at` is in seconds after `START`, what is missing is ordinary."""
    ordinary = {
        "recording": "test", "file": "test.csv", "final": False, "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2",
        "src_port": 40000, "dst_port": 80, "transport": "tcp", "bytes": 1000, "duration": 1_000_000, "label": "benign",
    }  # fmt: skip
    complete = []
    for number, row in enumerate(rows):
        values = {"row": number + 1, "flow_id": f"flow-{number}", **ordinary, **row}
        values["time"] = START + pd.Timedelta(seconds=float(values.pop("at", 10 * number)))
        complete.append(values)
    table = pd.DataFrame(complete)
    table["time"] = pd.to_datetime(table["time"], utc=True).astype(schema.TIME_DTYPE)
    return schema.conform(table)
