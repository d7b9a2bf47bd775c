"""`python -m flowsentry score`: files of flows through the live service, verdicts as NDJSON."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from flowsentry.errors import ConfigError
from flowsentry.monitoring import champion

if TYPE_CHECKING:
    import pandas as pd

_LISTED: Final = 20
"""Rows without a verdict that are named one by one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("flows", nargs="+", metavar="FLOWS", help="recordings: files, folders or globs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write verdicts here (default: the standard output)")
    parser.add_argument(
        "--ocsf", action="store_true", help="write the malicious verdicts alone, as OCSF detection findings for a SIEM"
    )
    champion.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Judge the flows on a stream of their own, and write one line a report.

    Rows without a verdict, and how many have one, are told on the standard error.

    Raises:
        FlowSentryError: flows cannot be read, the service is not there, the file cannot be written.
    """
    import orjson
    import pandas as pd

    from flowsentry.flows import sources
    from flowsentry.flows.schema import MALICIOUS
    from flowsentry.monitoring.pace import BATCH
    from flowsentry.monitoring.replay import PATIENCE_SECONDS, PROGRESS_SECONDS, Feed
    from flowsentry.serving import ocsf
    from flowsentry.serving.client import Client

    endpoint = champion.endpoint(args)
    loaded = sources.read(args.flows, on_progress=_say)
    reports = loaded.reports
    labels: Counter[str] = Counter()
    alarms: dict[int, dict[str, Any]] = {}
    without = [(row.file, row.row, row.reason) for row in loaded.quarantine.itertuples()]
    said = time.monotonic()
    with _output(args.out) as out, Client(endpoint.url, endpoint.token, patience=PATIENCE_SECONDS) as client:
        feed = Feed(reports, client, f"score-{secrets.token_hex(4)}")
        while feed.position < len(reports):
            first = feed.position
            part = reports.iloc[first : first + feed.next(BATCH)]
            for place, answer in zip(_places(part), feed.send(len(part)).answers, strict=True):
                if "rejected" in answer:
                    without.append((place["file"], place["row"], answer["rejected"]))
                    continue
                labels[answer["label"]] += 1
                position = first + answer.pop("index")
                if args.ocsf and answer["label"] == MALICIOUS:
                    alarms[position] = answer
                elif not args.ocsf:
                    out.write(orjson.dumps({**place, **answer}, option=orjson.OPT_APPEND_NEWLINE))
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                _say(f"{feed.position:,} of {len(reports):,} reports")
        feed.forget()
        if alarms:
            out.writelines(ocsf.findings(pd.DataFrame([*alarms.values()]), reports.iloc[[*alarms]]))
    for file, row, reason in without[:_LISTED]:
        _say(f"{file}:{row}: no verdict: {reason}")
    counted = ", ".join(f"{count:,} {label}" for label, count in sorted(labels.items())) or "none"
    more = f"; {len(without):,} rows have none" if without else ""
    _say(f"{sum(labels.values()):,} verdicts: {counted}{more}")


def _places(reports: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for file, row in zip(reports["file"].astype(str), reports["row"].tolist(), strict=True):
        yield {"file": file, "row": row}


@contextmanager
def _output(path: Path | None) -> Iterator[IO[bytes]]:
    """The standard output, or a file that appears when it is whole."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(f"{path.name}.part")
    try:
        file = part.open("wb")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from error
    try:
        with file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
