"""`python -m flowsentry status`: what is deployed on this machine, and what runs."""

from __future__ import annotations

import argparse

from flowsentry.serving.commands import describe
from flowsentry.serving.local import LocalDeployer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print it as JSON, times in seconds")


def run(args: argparse.Namespace) -> None:
    """Print the status; nothing is started.

    Raises:
        DeployError: the record is damaged.
    """
    status = LocalDeployer().status()
    print(status.model_dump_json(indent=1) if args.json else describe(status))
