"""`python -m flowsentry COMMAND`: helpers beside the pipelines of run.py."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from flowsentry.errors import FlowSentryError

COMMANDS: Final = {
    "download": ("flowsentry.flows.download", "fetch the published flows, with checksums and resume"),
    "live": ("flowsentry.monitoring.live", "show a replay while it goes on, as a page on this machine"),
    "replay": ("flowsentry.monitoring.replay_command", "send labelled flows to the live service, and keep score"),
    "score": ("flowsentry.monitoring.score_command", "judge files of flows by the live service, verdicts as NDJSON"),
    "simulate": ("flowsentry.simulation.command", "write a simulated recording to a file"),
    "start": ("flowsentry.serving.start_command", "bring this machine's champion back, as after a restart"),
    "status": ("flowsentry.serving.status_command", "what is deployed on this machine, and what runs"),
    "stop": ("flowsentry.serving.stop_command", "stop this machine's services"),
}
"""Name of every command: the module with its `add_arguments(parser)` and `run(args)`, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 only if it did what was asked."""
    parser = argparse.ArgumentParser(prog="python -m flowsentry", description="Helpers beside run.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        command = importlib.import_module(module)
        sub = commands.add_parser(name, help=purpose, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except FlowSentryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
