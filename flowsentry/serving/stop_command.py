"""`python -m flowsentry stop`: stop the services of this machine; they store their streams, the record stays."""

from __future__ import annotations

import argparse

from flowsentry.serving.local import LocalDeployer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""


def run(args: argparse.Namespace) -> None:
    """Stop everything; nothing happens if nothing runs.

    Raises:
        DeployError: it does not end.
    """
    deployer = LocalDeployer()
    running = deployer.status().running
    deployer.stop()
    print("stopped; `python -m flowsentry start` brings the champion back" if running else "nothing runs")
