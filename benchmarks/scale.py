"""File to flows to `behaviour` features, on a recording repeated until it has millions of reports.

    make bench ONLY=scale

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
from _data import DEFAULT, recording, repeated, write_published

from flowsentry.features import behaviour
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.sources import read


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
    parser.add_argument("--flows", type=Path, default=DEFAULT)
    parser.add_argument("--reports", type=int, default=5_090_910)
    parser.add_argument("--reports-per-flow", type=float, default=8.4)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    original = recording(arguments.flows)
    copies = int(np.ceil(arguments.reports / arguments.reports_per_flow / len(original))) + 1
    everything = repeated(original, copies, arguments.reports_per_flow)
    with tempfile.TemporaryDirectory() as folder:
        for count in (arguments.reports // 10, arguments.reports):
            path = Path(folder) / f"{count}.csv"
            write_published(everything.iloc[:count], path)
            subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)


if __name__ == "__main__":
    main()
