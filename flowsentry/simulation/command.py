"""`python -m flowsentry simulate`: write a simulated recording to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ValidationError

from flowsentry.errors import ConfigError
from flowsentry.simulation.files import WRITERS, write
from flowsentry.simulation.recording import simulate
from flowsentry.simulation.settings import SimulationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    default = SimulationSettings()
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"file to write ({', '.join(WRITERS)}): canonical columns with truth, published layout, Packetbeat events",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="equal seeds give equal recordings (default %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=int,
        default=default.minutes,
        help="length; the first 30 minutes are free of attacks (default %(default)s)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=default.scale,
        help="traffic factor; 1 is about 2.8 benign flows a second (default %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Simulate and write; say what was written.

    Raises:
        ConfigError: a setting is out of range, or the file cannot be written.
    """
    try:
        settings = SimulationSettings(seed=args.seed, minutes=args.minutes, scale=args.scale)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from error
    reports = simulate(settings)
    write(reports, args.out)
    print(f"{args.out}: {len(reports):,} reports, {reports['label'].eq('malicious').mean():.0%} of them malicious")
