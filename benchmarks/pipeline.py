"""Whole runs as a user starts them, each in a process of its own, with an empty home for ZenML and MLflow.

    make bench ONLY=pipeline

Seconds of the first run on embedded simulated flows, of the same run again (all steps cached), and of the study's
configuration on the real recording, where it is here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _data import DEFAULT

ROOT = Path(__file__).resolve().parents[1]


def seconds(home: Path, *arguments: str) -> float:
    """Run the pipeline `train` and return the seconds; a failed run ends the benchmark."""
    environment = {**os.environ, "ZENML_CONFIG_PATH": str(home / "zenml"), "HOME": str(home)}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--pipeline", "train", *arguments],
        check=True,
        cwd=home,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def main() -> None:
    """Run and print."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        print(f"train on embedded flows, first run: {seconds(home):6.1f} s")
        print(f"the same again, nothing changed:    {seconds(home):6.1f} s")
        if DEFAULT.exists():
            paper = ("--config", str(ROOT / "configs" / "paper.yaml"), "--data", str(DEFAULT))
            print(f"paper.yaml on the real flows:       {seconds(home, *paper):6.1f} s")
        else:
            print(f"{DEFAULT.name} is not here: paper.yaml was not measured")


if __name__ == "__main__":
    main()
