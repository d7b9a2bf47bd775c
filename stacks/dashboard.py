"""Serve ZenML's dashboard of the local store, in the foreground."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from flowsentry import telemetry

telemetry.disable()

from zenml.client import Client  # noqa: E402
from zenml.enums import StoreType  # noqa: E402


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m stacks.dashboard", description=__doc__)
    parser.add_argument("--port", type=int, default=8237)
    arguments = parser.parse_args()
    skip_survey()
    # In the foreground, so that nothing is left behind and the user's ZenML client is not pointed anywhere else.
    zenml = str(Path(sys.executable).parent / "zenml")
    print(f"http://127.0.0.1:{arguments.port}, Ctrl+C ends it", flush=True)
    os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "WARNING")
    os.execv(zenml, [zenml, "login", "--local", "--blocking", "--port", str(arguments.port)])


def skip_survey() -> None:
    """Answer the form that asks for name, address and consent to mail before the first page, with no.

    An answer that the user gave stays, and so does everything on a server.
    """
    client = Client()
    if client.zen_store.type != StoreType.SQL:
        return
    user = client.get_user(client.active_user.id)
    if user.email_opted_in is None:
        metadata = {**user.user_metadata, "finished_onboarding_survey": True}
        client.update_user(user.id, updated_email="", updated_email_opt_in=False, updated_metadata=metadata)


if __name__ == "__main__":
    main()
