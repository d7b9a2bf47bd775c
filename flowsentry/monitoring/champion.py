"""Which service the commands talk to: this machine's champion, or the one named."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowsentry.errors import ConfigError
from flowsentry.serving.deployer import Endpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments that name a service."""
    parser.add_argument("--endpoint", metavar="URL", help="of a service (default: this machine's champion)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the bearer token of --endpoint")


def endpoint(args: argparse.Namespace) -> Endpoint:
    """The service that the arguments name; this machine's champion is started if it does not run.

    Raises:
        ConfigError: the token's file cannot be read, or is given without a URL.
        DeployError: there is no champion, or it does not start.
    """
    if args.endpoint is None:
        if args.token_file is not None:
            raise ConfigError("--token-file belongs to --endpoint")
        from flowsentry.serving.local import LocalDeployer

        return LocalDeployer().endpoint()
    return Endpoint(url=args.endpoint, token=None if args.token_file is None else _token(args.token_file))


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: cannot be read ({type(error).__name__})") from error
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"--token-file {path}: holds no token")
    return token
