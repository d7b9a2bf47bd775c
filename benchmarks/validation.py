"""One million reports with 1% bad rows: the whole validation, against Great Expectations' own row-level format.

    make bench ONLY=validation

The alternative asks the same suite for the identity (file, row) of every failing row with
`unexpected_index_column_names`, and builds neither quarantine nor page.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd

from flowsentry import telemetry
from flowsentry.flows import expectations
from flowsentry.flows.schema import conform

BAD_SHARE = 0.01


def make_reports(rows: int, seed: int = 0) -> pd.DataFrame:
    """Reports as a meter writes them; every hundredth has one of five mistakes."""
    rng = np.random.default_rng(seed)
    addresses = np.array([f"10.{i // 250}.{i % 250}.7" for i in range(2_000)])
    src_bytes, dst_bytes = rng.integers(60, 100_000, (2, rows))
    start = pd.Timestamp("2026-01-05T00:00:00Z") + pd.to_timedelta(np.sort(rng.integers(0, 86_400_000, rows)), "ms")
    duration = rng.integers(0, 10**10, rows)
    table = pd.DataFrame(
        {
            "recording": pd.Categorical.from_codes(np.zeros(rows, int), ["benchmark"]),
            "file": pd.Categorical.from_codes(np.zeros(rows, int), ["benchmark.ndjson"]),
            "row": np.arange(1, rows + 1),
            "flow_id": pd.Series(np.arange(rows)).astype("string[pyarrow]"),
            "final": rng.random(rows) < 0.2,
            "src_ip": pd.Categorical.from_codes(rng.integers(0, 2_000, rows), addresses),
            "dst_ip": pd.Categorical.from_codes(rng.integers(0, 2_000, rows), addresses),
            "src_port": rng.integers(32_768, 61_000, rows),
            "dst_port": rng.choice([53, 80, 443, 3306, 8080], rows),
            "transport": pd.Categorical.from_codes(rng.integers(0, 2, rows), ["tcp", "udp"]),
            "bytes": src_bytes + dst_bytes,
            "time": start + pd.to_timedelta(duration // 1000, "us"),
            "duration": duration,
            "label": pd.Categorical.from_codes(rng.integers(-1, 2, rows), ["benign", "malicious"]),
            "start": start,
            "end": start + pd.to_timedelta(duration // 1000, "us"),
            "src_bytes": src_bytes,
            "dst_bytes": dst_bytes,
        }
    )
    table = conform(table)
    bad = np.array_split(rng.choice(rows, int(rows * BAD_SHARE), replace=False), 5)
    place = table.columns.get_loc
    table.iloc[bad[0], place("dst_port")] = 70_000
    table.iloc[bad[1], place("src_port")] = pd.NA
    table.iloc[bad[2], place("bytes")] = -1
    table.iloc[bad[3], place("time")] = pd.Timestamp("2031-01-01T00:00:00Z")
    table.iloc[bad[4], place("end")] = pd.Timestamp("2026-01-01T00:00:00Z")
    return table


def main(rows: int) -> None:
    """Print both times and that both found the same rows."""
    telemetry.disable()
    import great_expectations

    table = make_reports(rows)
    nothing = pd.DataFrame({"file": [], "row": [], "reason": [], "raw": []})
    begun, used = time.perf_counter(), time.process_time()
    validated = expectations.validate(table, quarantined_at_load=nothing, rows_read=rows, max_quarantine_share=0.02)
    ours, cpu = time.perf_counter() - begun, time.process_time() - used
    print(f"Great Expectations {great_expectations.__version__}, {rows:,} rows, {len(validated.quarantine):,} bad")
    print(f"validate(), quarantine and page included   {ours:6.1f} s wall   {cpu:6.1f} s CPU")

    batch, suite = expectations.prepare(table)
    begun, used = time.perf_counter(), time.process_time()
    outcome = batch.validate(
        suite,
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["file", "row"]},
    )
    theirs, cpu = time.perf_counter() - begun, time.process_time() - used
    print(f"unexpected_index_column_names, checks only {theirs:6.1f} s wall   {cpu:6.1f} s CPU")
    found = {item["row"] for check in outcome.results for item in check.result.get("unexpected_index_list") or ()}
    print(f"same bad rows: {found == set(validated.quarantine['row'])}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
