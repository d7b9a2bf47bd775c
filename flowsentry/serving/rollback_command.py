"""`python -m flowsentry rollback`: make the previous champion of this machine the champion again.

ZenML's model stages stay as they are; `python run.py --rollback` moves them too.
"""

from __future__ import annotations

import argparse

from flowsentry.serving.commands import describe
from flowsentry.serving.local import LocalDeployer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""


def run(args: argparse.Namespace) -> None:
    """Roll back without a failed request, and print the status.

    Raises:
        DeployError: there is nothing to go back to, or it does not become ready; the champion stays.
    """
    deployer = LocalDeployer()
    deployer.rollback()
    print(describe(deployer.status()))
