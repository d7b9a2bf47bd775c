"""Replay: labelled flows, sent to the live service in arrival order and at a pace, with every answer in a journal.

A replay has a stream of its own at the service, so the live stream does not notice it. Every report gets exactly one
verdict, the same as offline: through a restart of the service (what it lost is sent again, and absorbed) and through
the end of the replay itself (the journal says where to go on).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import pandas as pd

from flowsentry.errors import ConfigError, ServiceError
from flowsentry.flows import labels
from flowsentry.flows.reports import identify
from flowsentry.monitoring import figures
from flowsentry.monitoring.journal import NARROW, SUFFIX, Announced, Header, Journal, Model, Reader, folder
from flowsentry.monitoring.pace import Pace
from flowsentry.serving.client import Client, StreamClient, as_rows
from flowsentry.serving.deployer import Endpoint

PATIENCE_SECONDS: Final = 120.0
"""How long a service may be away, e.g. to start again."""
PROGRESS_SECONDS: Final = 5.0

_CHUNK: Final = 4096

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReplaySummary:
    """What a replay did."""

    journal: Path
    reports: int
    """With an answer in the journal, rejected ones included."""
    rejected: int
    resent: int
    """Sent again because the service had lost them; absorbed, not judged twice."""
    seconds: float
    standing: figures.Standing
    findings: tuple[figures.Finding, ...]


@dataclass(frozen=True)
class Sent:
    """A request and its answers."""

    answers: list[dict[str, Any]]
    """One a report, in order, see `Answers.rows`."""
    latency_ms: float
    time: int
    """When it was sent, ms since 1970."""


class Feed:
    """Canonical reports on their way to a service: one stream for each recording, in arrival order."""

    def __init__(self, reports: pd.DataFrame, client: Client, stream: str, *, position: int = 0) -> None:
        """Nothing is sent yet.

        Args:
            reports: canonical; recordings follow one another.
            client: of the service.
            stream: name of the first recording's stream; the others' end in `.1`, `.2`, ...
            position: of the first report that has no answer yet.
        """
        self.position = position
        self._reports = reports
        self._client = client
        self._name = stream
        codes = reports["recording"].cat.codes.to_numpy()
        self._begins = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist()]
        self._resent = 0
        self._chunk = -1
        self._rows: list[dict[str, Any]] = []
        self._stream = self._at(position)

    @property
    def resent(self) -> int:
        """Flows that the service had lost and got again."""
        return self._resent + self._stream.resent

    def next(self, most: int) -> int:
        """Reports that the next request can hold: at most so many, of one recording."""
        following = bisect_right(self._begins, self.position)
        end = self._begins[following] if following < len(self._begins) else len(self._reports)
        return min(most, end - self.position)

    def send(self, count: int) -> Sent:
        """Send the next reports in one request and wait for their answers.

        Raises:
            ServiceError: the service refuses them, or is not there.
        """
        if self.position in self._begins[1:]:
            self._resent += self._stream.resent
            self._stream = self._at(self.position)
        rows = [self._row(i) for i in range(self.position, self.position + count)]
        sent, clock = time.time(), time.perf_counter()
        try:
            answers = self._stream.send(rows)
        except ServiceError:
            if not self._client.ready():
                raise
            status = self._client.stream_status(self._stream.stream)
            if status is not None and status["seen"] == self._stream.seen:
                raise
            # it forgot flows that are no longer kept, or knows answers that this side never got: tell it all again
            self._client.delete_stream(self._stream.stream)
            self._resent += self._stream.resent
            self._stream = self._at(self.position)
            answers = self._stream.send(rows)
        latency = (time.perf_counter() - clock) * 1000
        self.position += count
        return Sent(answers.rows(), latency, int(sent * 1000))

    def forget(self) -> None:
        """Delete the streams at the service."""
        for i in range(len(self._begins)):
            self._client.delete_stream(self._named(i))

    def _at(self, position: int) -> StreamClient:
        """The stream of a report's recording, with all before the report at hand to be sent again."""
        i = bisect_right(self._begins, position) - 1
        begin = self._begins[i]
        return StreamClient(
            self._client, self._named(i), seen=position - begin, before=self._reports.iloc[begin:position]
        )

    def _named(self, recording: int) -> str:
        return f"{self._name}.{recording}" if recording else self._name

    def _row(self, position: int) -> dict[str, Any]:
        """A report as it is sent; the same bytes whichever process sends it."""
        chunk, i = divmod(position, _CHUNK)
        if chunk != self._chunk:
            self._chunk, self._rows = chunk, as_rows(self._reports.iloc[chunk * _CHUNK : (chunk + 1) * _CHUNK])
        return self._rows[i]


def prepare(reports: pd.DataFrame) -> pd.DataFrame:
    """Canonical reports with what a replay needs to know: flow numbers, families and corrected labels."""
    if "flow" not in reports:
        reports = reports.assign(flow=identify(reports))
    if not {"corrected", "family"} <= set(reports):
        reports, _ = labels.derive(reports)
    return reports


def begin(
    reports: pd.DataFrame,
    *,
    source: str,
    endpoint: Endpoint,
    pace: Pace,
    path: Path | None = None,
    stream: str | None = None,
) -> Journal:
    """Make the journal of a new replay.

    Args:
        reports: as `prepare` gives them.
        source: for people: which flows.
        endpoint: of the service.
        pace: for people, and for a replay that goes on.
        path: of the journal; by default in the user's folder of replays.
        stream: name at the service; by default one that nobody else has.

    Raises:
        ConfigError: no flow is labelled, or the journal cannot be made.
    """
    if not reports["corrected"].notna().any():
        raise ConfigError(f"{source}: no flow is labelled, nothing can be right or wrong; `score` judges such flows")
    name = secrets.token_hex(4)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    header = Header(
        stream=stream or f"replay-{name}",
        source=source,
        digest=digest(reports),
        total=len(reports),
        pace=str(pace),
        endpoint=endpoint.url,
        begun=time.time(),
    )
    return Journal.create(path or folder() / f"{stamp}-{name}{SUFFIX}", header)


def replay(
    reports: pd.DataFrame,
    endpoint: Endpoint,
    *,
    journal: Journal,
    pace: Pace | None = None,
    keep_stream: bool = False,
    patience: float = PATIENCE_SECONDS,
    on_progress: Say = lambda message: None,
) -> ReplaySummary:
    """Send what the journal has no answer for, until all have one.

    Args:
        reports: as `prepare` gives them; the same that the journal was begun with.
        endpoint: of the service.
        journal: a new one (`begin`), or that of a replay that was stopped (`Journal.resume`).
        pace: by default the journal's.
        keep_stream: leave the stream's state at the service.
        patience: seconds that the service may be away.
        on_progress: is told at most every 5 s how far it is.

    Raises:
        ConfigError: these are other flows than the journal's.
        ServiceError: the service refuses, or stays away; the journal can be resumed.
    """
    header = journal.header
    if (len(reports), digest(reports)) != (header.total, header.digest):
        raise ConfigError(f"{journal.path}: this replay was begun with other flows ({header.source}); give the same")
    pace = pace or Pace.parse(header.pace)
    began = said = time.monotonic()
    with Client(endpoint.url, endpoint.token, patience=patience) as client:
        feed = Feed(reports, client, header.stream, position=journal.count)
        truth = _Truth(reports)
        versions = [model.version for model in journal.models]
        due = time.monotonic()
        request = journal.announced
        while feed.position < header.total:
            time.sleep(max(due - time.monotonic(), 0.0))
            due = max(due, time.monotonic()) + pace.seconds
            first = feed.position
            if request is None or request.first != first:
                request = Announced(first, feed.next(pace.flows))
                journal.announce(request)
            sent = feed.send(request.count)
            for i, answer in enumerate(sent.answers):
                version = answer.get("model_version")
                if version is not None and [version] != versions[-1:]:
                    journal.add_model(Model(first + i, str(version), client.model()))
                    versions.append(version)
            shared = {"request": first, "latency_ms": sent.latency_ms, "sent": sent.time}
            journal.add([truth.of(first + i) | _verdict(answer) | shared for i, answer in enumerate(sent.answers)])
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                on_progress(f"{feed.position:,} of {header.total:,} reports, {_spent(feed, said - began)}")
        if journal.finished is None:
            journal.finish()
        if not keep_stream:
            feed.forget()
        resent = feed.resent
    return _summary(journal.path, resent, time.monotonic() - began)


def tally(path: Path) -> tuple[figures.Tally, list[Model]]:
    """The running scores of all that a journal has, and the models that answered."""
    scores = figures.Tally()
    with Reader(path) as reader:
        while not (rows := reader.read(scores.position, columns=NARROW)).empty:
            scores.take(rows)
        return scores, reader.models


def digest(reports: pd.DataFrame) -> str:
    """SHA-256 (hex) of what would be sent, and of the truth about it."""
    found = hashlib.sha256()
    for begin in range(0, len(reports), _CHUNK):
        part = reports.iloc[begin : begin + _CHUNK]
        found.update(orjson.dumps(as_rows(part)))
        for name in ("recording", "corrected", "family"):
            found.update("\0".join(part[name].astype("string").fillna("").tolist()).encode())
    return found.hexdigest()


class _Truth:
    """What a journal says of a report besides its answer."""

    def __init__(self, reports: pd.DataFrame) -> None:
        self._reports = reports
        self._chunk = -1
        self._rows: list[dict[str, Any]] = []

    def of(self, position: int) -> dict[str, Any]:
        chunk, i = divmod(position, _CHUNK)
        if chunk != self._chunk:
            self._chunk, self._rows = chunk, list(self._of(chunk * _CHUNK))
        return self._rows[i]

    def _of(self, begin: int) -> Iterator[dict[str, Any]]:
        part = self._reports.iloc[begin : begin + _CHUNK]
        columns: dict[str, Sequence[Any]] = {
            "flow": part["flow"].tolist(),
            "flow_id": part["flow_id"].tolist(),
            "time": part["time"].dt.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64).tolist(),
            **{name: _plain(part[name]) for name in ("src_ip", "dst_ip", "src_port", "dst_port", "transport")},
            "expected": _plain(part["corrected"]),
            "family": _plain(part["family"]),
        }
        for i, values in enumerate(zip(*columns.values(), strict=True)):
            yield {"position": begin + i} | dict(zip(columns, values, strict=True))


def _plain(column: pd.Series) -> list[Any]:
    return [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]


def _verdict(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The journal's columns of an answer."""
    reasons = answer.get("reasons") or []
    return {
        "verdict": answer.get("label"),
        "rejected": answer.get("rejected"),
        "anomaly_score": answer.get("anomaly_score"),
        "threshold": answer.get("threshold"),
        "warm": answer.get("warm"),
        "anomaly_type": answer.get("anomaly_type"),
        "reason": reasons[0]["text"] if reasons else None,
    }


def _spent(feed: Feed, seconds: float) -> str:
    return f"{seconds:,.0f} s" + (f", {feed.resent:,} sent again" if feed.resent else "")


def _summary(path: Path, resent: int, seconds: float) -> ReplaySummary:
    scores, models = tally(path)
    card = figures.card_of(models[-1].description) if models else None
    progress = figures.Progress(scores.rows, finished=True, silent_seconds=0.0)
    found = tuple(figures.findings(scores, card, progress))
    return ReplaySummary(path, scores.rows, scores.rejected, resent, seconds, scores.standing, found)
