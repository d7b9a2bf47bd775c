"""Stop a run in the cluster: python -m stacks.stop RUN (name or id)."""

from __future__ import annotations

import argparse
import sys

from flowsentry import telemetry
from flowsentry.errors import FlowSentryError
from stacks import preflight


def main() -> int:
    """Ask the orchestrator to stop; gives the exit status."""
    telemetry.disable()
    parser = argparse.ArgumentParser(prog="python -m stacks.stop", description=__doc__)
    parser.add_argument("run", metavar="RUN")
    name = parser.parse_args().run
    try:
        preflight.log_in()
    except FlowSentryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from zenml.client import Client
    from zenml.exceptions import IllegalOperationError
    from zenml.utils.run_utils import stop_run

    from stacks import console

    console.quiet()
    try:
        stop_run(Client().get_pipeline_run(name, allow_name_prefix_match=False))
    except (KeyError, IllegalOperationError) as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 1
    print(f"the run {name} is being stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
