"""Run a program without a network but this machine's own, and say whom it wanted to reach."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_GUARD = """
import os, sys

def guard(event, arguments):
    if event == "socket.getaddrinfo":
        target = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        target = arguments[1]
    else:
        return
    if isinstance(target, (str, bytes)) and event != "socket.getaddrinfo":
        return  # a Unix socket: a path on this machine
    host = target[0] if isinstance(target, tuple) else target
    if host in ("127.0.0.1", "::1", "localhost"):
        return  # its own services
    with open(os.environ["TEST_NETWORK_LOG"], "a") as log:
        print(event, target, file=log)
    raise OSError(f"the network is cut off: {target}")

sys.addaudithook(guard)
"""


def run_offline(
    command: Sequence[str], *, scratch: Path, cwd: Path, environment: Mapping[str, str], timeout: float
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a Python program, its children included, in which every connection to elsewhere fails.

    Args:
        command: arguments of this Python.
        scratch: an empty folder.
        cwd: where it runs.
        environment: all of it.
        timeout: in seconds.

    Returns:
        The finished process, and whom it tried to reach elsewhere.
    """
    (scratch / "sitecustomize.py").write_text(_GUARD)
    log = scratch / "reached.txt"
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=cwd,
        env={
            **environment,
            "TEST_NETWORK_LOG": str(log),
            "PYTHONPATH": os.pathsep.join([str(scratch), *filter(None, [environment.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done, log.read_text().splitlines() if log.exists() else []
