"""A service without HTTP: requests go to `Streams` by function call, through the same parser and the same answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import orjson
import pandas as pd

from flowsentry.detector import Detector, Judged
from flowsentry.errors import StoreError
from flowsentry.serving import wire
from flowsentry.serving.client import Reply, encode
from flowsentry.serving.protocol import JSON
from flowsentry.serving.store import Store
from flowsentry.serving.streams import Position, Streams, Taken

LATER_MS = 1 << 42
"""No recording is from the future."""


class ListStore:
    """Contents in a dictionary; refuses to answer while `is_down`."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.is_down = False

    def read(self, name: str, most: int | None = None) -> bytes | None:
        self._check()
        content = self.contents.get(name)
        return content if content is None else content[:most]

    def write(self, name: str, content: bytes) -> None:
        self._check()
        self.contents[name] = content

    def delete(self, name: str) -> None:
        self._check()
        self.contents.pop(name, None)

    def _check(self) -> None:
        if self.is_down:
            raise StoreError("the store is down")


class View:
    """A store that can be cut off from what it shows: a killed process writes nothing more."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_cut = False

    def read(self, name: str, most: int | None = None) -> bytes | None:
        self._check()
        return self._store.read(name, most)

    def write(self, name: str, content: bytes) -> None:
        self._check()
        self._store.write(name, content)

    def delete(self, name: str) -> None:
        self._check()
        self._store.delete(name)

    def _check(self) -> None:
        if self.is_cut:
            raise StoreError("cut off")


def ask(
    streams: Streams,
    flows: pd.DataFrame | list[dict[str, Any]],
    *,
    stream: str = "s",
    seen: int | None = None,
    absorb: bool = False,
    anew: bool = False,
    before_answer: Callable[[], object] = lambda: None,
) -> Taken:
    """One request, as JSON."""
    body = encode(flows, JSON)
    return post(streams, body, stream=stream, seen=seen, absorb=absorb, anew=anew, before_answer=before_answer)


def post(
    streams: Streams,
    body: bytes,
    *,
    media_type: str = JSON,
    stream: str,
    seen: int | None,
    absorb: bool,
    anew: bool,
    before_answer: Callable[[], object] = lambda: None,
) -> Taken:
    batch = wire.parse(body, media_type, max_flows=100_000, now_ms=LATER_MS)

    def render(position: Position, judged: Judged | None) -> bytes:
        before_answer()
        head = wire.Head(position.stream, position.seen, position.durable, "7", "behaviour", "1", 3.0)
        return wire.answer(media_type, head, judged, batch)

    digest = hashlib.sha256(body).digest()
    return streams.take(stream, batch, seen=seen, digest=digest, absorb=absorb, anew=anew, render=render)


def reply(taken: Taken, media_type: str = JSON) -> Reply:
    return Reply(taken.answer, media_type, taken.seen, taken.durable)


def scores(taken: Taken) -> list[tuple[Any, ...]]:
    """What an answer says of its flows."""
    return [told(verdict) for verdict in orjson.loads(taken.answer)["verdicts"]]


def told(verdict: dict[str, Any]) -> tuple[Any, ...]:
    alarm = verdict["first_alarm"]
    return (
        verdict["flow_id"],
        verdict["anomaly_score"],
        verdict["label"],
        verdict["warm"],
        None if alarm is None else pd.Timestamp(alarm),
    )


def offline(detector: Detector, reports: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The same of the offline verdicts."""
    verdicts = detector.verdicts(reports)
    alarms = [None if pd.isna(alarm) else alarm for alarm in verdicts["first_alarm"]]
    return list(
        zip(
            reports["flow_id"].tolist(),
            verdicts["anomaly_score"].tolist(),
            verdicts["label"].tolist(),
            verdicts["warm"].tolist(),
            alarms,
            strict=True,
        )
    )
