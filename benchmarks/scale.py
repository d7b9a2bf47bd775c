"""File to flows to `behaviour` features, on a recording repeated until it has millions of reports.

    python benchmarks/scale.py [--flows FILE] [--reports 5090910] [--reports-per-flow 8.4]

The recording is repeated with shifted times and new ids; every flow is reported again each 10 s with growing bytes and
duration, as the meter of the published files does. Prints seconds and the peak memory of each stage, and the same for
a tenth of the reports: the cost is linear if the times differ by a factor of ten.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from flowsentry.features import behaviour
from flowsentry.flows import schema
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.sources import read


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


def measure(path: Path) -> None:
    """Time the stages on one file, in a process of its own so that the peak memory is theirs."""
    stages = {}
    begin = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal begin
        stages[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    reports = read([path]).reports
    stage("file to reports")
    reports["flow"] = identify(reports)
    flows = collapse(reports)
    stage("reports to flows")
    behaviour.compute(reports)
    stage("behaviour features")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items())
    print(f"{len(reports):,} reports of {len(flows):,} flows: {sum(stages.values()):.1f} s ({parts}), {peak:.1f} GiB")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=Path, default=Path("../shared/data/elastic_february2022_flows.csv.gz"))
    parser.add_argument("--reports", type=int, default=5_090_910)
    parser.add_argument("--reports-per-flow", type=float, default=8.4)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    recording = read([arguments.flows]).reports
    copies = int(np.ceil(arguments.reports / arguments.reports_per_flow / len(recording))) + 1
    everything = repeated(recording, copies, arguments.reports_per_flow)
    with tempfile.TemporaryDirectory() as folder:
        for count in (arguments.reports // 10, arguments.reports):
            path = Path(folder) / f"{count}.csv"
            write_published(everything.iloc[:count], path)
            subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)


if __name__ == "__main__":
    main()
