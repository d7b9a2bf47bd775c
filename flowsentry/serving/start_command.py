"""`python -m flowsentry start`: bring the champion of this machine back, as after a restart."""

from __future__ import annotations

import argparse

from flowsentry.serving.commands import describe
from flowsentry.serving.local import LocalDeployer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""


def run(args: argparse.Namespace) -> None:
    """Start what the record names, wait until it is ready, print the status.

    Raises:
        DeployError: there is nothing to start, or it does not become ready.
    """
    deployer = LocalDeployer()
    deployer.endpoint()
    print(describe(deployer.status()))
