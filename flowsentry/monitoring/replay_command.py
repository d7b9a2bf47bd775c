"""`python -m flowsentry replay`: labelled flows to the live service, right and wrong answers into a journal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flowsentry.errors import ConfigError
from flowsentry.monitoring import champion
from flowsentry.simulation.settings import NEW_SEED, TRAINING_SEED

if TYPE_CHECKING:
    import pandas as pd

    from flowsentry.monitoring.replay import ReplaySummary

SIMULATE: Final = "simulate"
SPEED: Final = "1x"
"""By default as in the original study: whoever starts a replay by hand looks at it as it goes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "flows",
        nargs="+",
        metavar="FLOWS",
        help=f"labelled recordings: files, folders or globs; or `{SIMULATE}`: a new simulated recording",
    )
    parser.add_argument(
        "--speed", help=f"times the study's pace of a flow every 0.35 s, e.g. 10x; or max (default {SPEED})"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=NEW_SEED,
        help=f"of `{SIMULATE}`; models are trained on {TRAINING_SEED} (default %(default)s)",
    )
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep the replay here (default: a new one)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with --journal, or the newest replay that was not finished; give the same flows",
    )
    champion.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Replay, and say what came out.

    Raises:
        FlowSentryError: flows cannot be read, a service is not there, a journal does not fit.
    """
    from flowsentry.monitoring import replay as replays
    from flowsentry.monitoring.journal import Journal
    from flowsentry.monitoring.pace import Pace

    try:
        pace = None if args.speed is None and args.resume else Pace.parse(args.speed or SPEED)
    except ConfigError as error:
        raise ConfigError(f"--speed: {error}") from None
    if args.resume and args.journal is None:
        args.journal = _unfinished()
    endpoint = champion.endpoint(args)
    reports, source = _read(args)
    if args.resume:
        journal = Journal.resume(args.journal)
    else:
        assert pace is not None
        journal = replays.begin(reports, source=source, endpoint=endpoint, pace=pace, path=args.journal)
    with journal:
        print(f"journal: {journal.path}\nlook at it: python -m flowsentry live", flush=True)
        summary = replays.replay(
            reports, endpoint, journal=journal, pace=pace, on_progress=lambda text: print(text, flush=True)
        )
    _report(summary)


def _read(args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """Prepared reports, and what they are."""
    from flowsentry.flows import sources
    from flowsentry.monitoring.replay import prepare
    from flowsentry.simulation import SimulationSettings, simulate

    if args.flows == [SIMULATE]:
        return prepare(simulate(SimulationSettings(seed=args.seed))), f"simulated flows, seed {args.seed}"
    loaded = sources.read(args.flows, on_progress=lambda text: print(text, flush=True))
    if len(loaded.quarantine):
        first = loaded.quarantine.iloc[0]
        print(
            f"{len(loaded.quarantine):,} records are no flows and are left out; "
            f"the first is {first['file']}:{first['row']}: {first['reason']}",
            flush=True,
        )
    return prepare(loaded.reports), ", ".join(loaded.files)


def _unfinished() -> Path:
    from flowsentry.monitoring import journal as journals

    for path in journals.journals(journals.folder()):
        with journals.Reader(path) as reader:
            if reader.finished is None:
                return path
    raise ConfigError("--resume: every replay was finished; name one with --journal, or begin a new one")


def _report(summary: ReplaySummary) -> None:
    standing = summary.standing
    rates = {
        "recall": standing.recall,
        "precision": standing.precision,
        "false alarms": standing.fpr,
        "balanced accuracy": standing.balanced_accuracy,
    }
    print(
        f"{summary.reports:,} reports answered in {summary.seconds:,.0f} s, {summary.rejected:,} of them rejected, "
        f"{summary.resent:,} sent again\n"
        f"{standing.flows:,} flows: {standing.right:,} right, {standing.wrong:,} wrong; "
        + ", ".join(f"{name} {'–' if rate is None else f'{rate:.2%}'}" for name, rate in rates.items())
    )
    for finding in summary.findings:
        print(f"{'!' if finding.severity == 'bad' else '-'} {finding.text}")
