"""The window kernel against the same features as DuckDB window SQL, in one run.

    make bench ONLY=kernel

Features that SQL can express: flows and failures of service, client and edge over 10, 60 and 300 s in arrival order
(18 columns). SQL gets the services and clients from the kernel: their orientation depends on counts over both ends.
Both are timed on two cores as they come (the kernel uses one), the median of three runs. The values must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from _data import DEFAULT, recording, repeated

from flowsentry.features import kernel
from flowsentry.flows.columns import NO_PAYLOAD_BYTES, Columns
from flowsentry.flows.hashing import hash_text
from flowsentry.flows.reports import clock_milliseconds

WINDOWS = (1, 6, 30)
"""Ticks of 10 s."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=Path, default=DEFAULT)
    parser.add_argument("--copies", type=int, default=10)
    arguments = parser.parse_args()
    reports = repeated(recording(arguments.flows), arguments.copies, 1)
    kernel.Stream().advance(Columns.of(reports.iloc[:1000]))

    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        advanced = kernel.Stream().advance(Columns.of(reports))
        features, turned = advanced.features, advanced.is_reversed
        durations.append(time.perf_counter() - begin)
    own = statistics.median(durations)

    table = oriented(reports, turned)
    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        counted = in_sql(table)
        durations.append(time.perf_counter() - begin)
    sql = statistics.median(durations)

    columns = pd.DataFrame(features, columns=list(kernel.FEATURES))
    failed = columns["no_payload"] == 1
    pairs = {
        "edge_fails_10s": counted["edge_fails_1"],
        "edge_fails_60s": counted["edge_fails_6"],
        "edge_fails_300s": counted["edge_fails_30"],
        "service_fails_60s": counted["service_fails_6"].where(failed, 0),
        "client_fails_60s": counted["client_fails_6"].where(failed, 0),
        "edge_fail_share": (counted["edge_fails_30"] / counted["edge_flows_30"]).astype(np.float32),
        "service_fail_share": (counted["service_fails_30"] / counted["service_flows_30"])
        .where(failed, 0)
        .astype(np.float32),
    }
    for name, expected in pairs.items():
        worst = float(np.abs(columns[name].to_numpy() - expected.to_numpy(np.float32)).max())
        print(f"{name:20s} largest difference {worst:g}")
        assert worst == 0, name
    print(f"{len(reports):,} flows")
    print(f"kernel, {len(kernel.FEATURES)} features, one core: {own:6.2f} s  {len(reports) / own:10,.0f} flows/s")
    print(f"DuckDB, 18 window counts, two cores: {sql:6.2f} s  {len(reports) / sql:10,.0f} flows/s")
    print(f"the kernel is {sql / own:.1f} times faster")


def oriented(reports: pd.DataFrame, turned: np.ndarray) -> pd.DataFrame:
    """Integer keys of service and client, tick, arrival and failure of every flow."""
    source, destination = hash_text(reports["src_ip"]), hash_text(reports["dst_ip"])
    source_port = reports["src_port"].fillna(0).to_numpy(np.int64)
    destination_port = reports["dst_port"].fillna(0).to_numpy(np.int64)
    service = pd.DataFrame(
        {
            "address": np.where(turned, source, destination),
            "port": np.where(turned, source_port, destination_port),
            "transport": reports["transport"].cat.codes.to_numpy(),
        }
    )
    client = np.where(turned, destination, source)
    return pd.DataFrame(
        {
            "arrival": np.arange(len(reports), dtype=np.int64),
            "tick": clock_milliseconds(reports["time"]) // 10_000,
            "service": service.groupby(list(service.columns)).ngroup().to_numpy(),
            "client": pd.factorize(client)[0],
            "failed": (reports["transport"].eq("tcp") & (reports["bytes"] <= NO_PAYLOAD_BYTES)).to_numpy(),
        }
    )


def in_sql(table: pd.DataFrame) -> pd.DataFrame:
    """18 window counts; the order (tick, arrival) is one number, so that a range ends at the flow itself."""
    keys = {"service": "service", "client": "client", "edge": "client, service"}
    columns, windows = [], []
    for entity, key in keys.items():
        for ticks in WINDOWS:
            name = f"{entity}_{ticks}"
            windows.append(
                f"{name} as (partition by {key} order by place "
                f"range between place - (tick - {ticks - 1}) * 4294967296 preceding and current row)"
            )
            columns.append(f"count(*) over {name} as {entity}_flows_{ticks}")
            columns.append(f"coalesce(sum(failed::integer) over {name}, 0) as {entity}_fails_{ticks}")
    query = f"""
        with placed as (select *, tick * 4294967296 + arrival as place from flows)
        select arrival, {", ".join(columns)} from placed window {", ".join(windows)} order by arrival
    """
    with duckdb.connect() as connection:
        connection.register("flows", table)
        return connection.execute(query).df()


if __name__ == "__main__":
    main()
