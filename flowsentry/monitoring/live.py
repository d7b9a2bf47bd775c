"""`python -m flowsentry live`: a page that shows a replay while it goes on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from flowsentry import telemetry
from flowsentry.errors import ConfigError

PORT: Final = 8501
OPTIONS: Final = {
    "server.address": "127.0.0.1",
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.runOnSave": "false",
    "runner.magicEnabled": "false",
    "browser.serverAddress": "127.0.0.1",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "theme.base": "light",
    "theme.primaryColor": "#0072B2",
}
"""Of Streamlit: this machine alone may look, nothing is sent anywhere, nothing is fetched from anywhere."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="show this replay (default: the newest, with a choice of the others)",
    )
    parser.add_argument("--port", type=int, default=PORT, help="of the page on 127.0.0.1 (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Become the page's server; ends with Ctrl-C.

    Raises:
        ConfigError: the port is impossible, or the journal is missing.
    """
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: a port is 1..65535")
    if args.journal is not None and not args.journal.is_file():
        raise ConfigError(f"--journal {args.journal}: there is no such replay")
    print(f"live page: http://127.0.0.1:{args.port} (ends with Ctrl-C)", flush=True)
    telemetry.disable()
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    os.execve(sys.executable, command(args.port, args.journal), environment)


def command(port: int, journal: Path | None) -> list[str]:
    """The command line of the page's server."""
    page = Path(__file__).with_name("live_page.py")
    options = [f"--{name}={value}" for name, value in {**OPTIONS, "server.port": str(port)}.items()]
    return [sys.executable, "-m", "streamlit", "run", str(page), *options, "--", *([str(journal)] if journal else [])]
