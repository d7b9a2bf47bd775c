"""The stream protocol: what a service remembers of every stream, how it stays bounded, and how it survives a restart.

No HTTP here. Everything is synchronous and may be called from several threads. `Streams.take` on a stream that
`Streams.is_open` waits for nothing and touches no store, unless the client's position differs from the service's.
`status` of a stream that is not open, `take` with `anew`, `forget`, `release`, `checkpoint` and `close` may touch the
store too: an event loop runs them in a thread. A request whose stream the service is just dropping waits a moment for
the end of that.

A checkpoint holds the stream's state, the number of flows that it has seen, and the answer to its last request, so
that a request whose answer was lost is answered again after a restart. Two services that serve one stream from one
store do not undo each other: a checkpoint is ordered by (generation, seen), the generation rises whenever a client
begins the stream anew, and a lower one never replaces a higher one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from flowsentry.detector import Detector, Judged, Watch
from flowsentry.errors import ServiceError, StoreError
from flowsentry.serving.protocol import SeenMismatch
from flowsentry.serving.store import Store
from flowsentry.serving.wire import Batch

_log: Final = logging.getLogger(__name__)
_MAGIC: Final = b"flowsentry stream 1\n"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_MOST_HEADER_BYTES: Final = 4096
_MOST_ANSWER_BYTES: Final = 1 << 29
_MOST_SEEN: Final = 1 << 62
_LEAVING_SECONDS: Final = 1.0
"""How long a request waits while the service itself writes and drops its stream."""
_RELEASE_SECONDS: Final = 5.0
_REST: Final = 3.0
"""How many times the duration of a checkpoint the writer then rests: at most a quarter of a core goes into them."""


class StreamBusy(ServiceError):
    """Another request of the same stream is being answered."""


class TooManyStreams(ServiceError):
    """No further stream can be opened, and none can be dropped."""


@dataclass(frozen=True)
class Limits:
    """What all streams together may take, and when they are written."""

    streams: int = 256
    memory_bytes: int = 2 << 30
    """States and kept answers."""
    checkpoint_flows: int = 20_000
    """A stream is written after so many more flows ..."""
    checkpoint_seconds: float = 5.0
    """... or so long after the first unwritten one; also the wait before a failed write is tried again."""


@dataclass(frozen=True)
class Position:
    """Where a stream stands."""

    stream: str
    seen: int
    """Flows taken, rejected ones too."""
    durable: int
    """How many of them a restart will remember."""
    warm: bool
    """The stream's baseline is past its warm-up."""


@dataclass(frozen=True)
class Taken:
    """The outcome of a request."""

    answer: bytes
    seen: int
    durable: int
    repeated: bool
    """The request was the stream's last one again; nothing was taken."""
    judged: Judged | None
    """None if nothing was judged for this answer: absorbed or repeated."""


@dataclass
class Counters:
    """Totals since the start."""

    resent_flows: int = 0
    repeated_requests: int = 0
    evictions: int = 0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    """Time that the checkpoints took, from the snapshot to the end of the write."""
    checkpoint_failures: int = 0
    fenced: int = 0
    """Streams dropped because another service went further with them."""
    set_aside: int = 0
    """Stored checkpoints that could not be used."""


@dataclass(frozen=True)
class _Last:
    """A stream's last request and its answer."""

    seen: int
    """Before the request."""
    count: int
    digest: str
    """Hex; covers all that shapes the answer."""
    answer: bytes
    detector: str
    """Digest of the one that judged."""

    def is_same(self, seen: int | None, count: int, digest: str, detector: str) -> bool:
        return (self.seen, self.count, self.digest, self.detector) == (seen, count, digest, detector)


@dataclass(eq=False)
class _Stream:
    name: str
    watch: Watch
    seen: int = 0
    generation: int = 0
    last: _Last | None = None
    durable: int = 0
    changes: int = 0
    """Changes of the state so far; `saved` of them are stored."""
    saved: int = 0
    unsaved_since: float = 0.0
    retry_at: float = 0.0
    failing: bool = False
    nbytes: int = 0
    ready: bool = False
    """Opened: what was stored has been read."""
    busy: bool = True
    leaving: bool = False
    """Busy because the service writes it to drop it."""
    gone: bool = False
    """No longer to be used, nor written."""
    state: threading.Lock = field(default_factory=threading.Lock)
    """Held while the state changes or is copied."""
    io: threading.Lock = field(default_factory=threading.Lock)
    """Held while the stored checkpoint is read or written; taken before `state`."""

    @property
    def order(self) -> tuple[int, int]:
        return self.generation, self.seen


@dataclass(frozen=True)
class _Checkpoint:
    header: dict[str, Any]
    state: bytes
    last: _Last | None


class Streams:
    """All streams of one service: one detector, one store."""

    def __init__(self, detector: Detector, store: Store, limits: Limits) -> None:
        self.counters = Counters()
        self._detector = detector
        self._store = store
        self._limits = limits
        self._streams: dict[str, _Stream] = {}
        """The least recently used first."""
        self._guard = threading.Condition()
        """Held for moments only: the table, and the marks `busy` and `gone`."""
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._writer = threading.Thread(target=self._write_when_due, name="checkpoints", daemon=True)
        self._writer.start()

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def nbytes(self) -> int:
        """Memory of all open streams, bytes."""
        with self._guard:
            return sum(stream.nbytes for stream in self._streams.values())

    def is_open(self, name: str) -> bool:
        """Whether `take` can answer from memory at once: the stream is open, not being copied and not being dropped."""
        stream = self._streams.get(name)
        return stream is not None and stream.ready and not stream.leaving and not stream.state.locked()

    def take(
        self,
        name: str,
        batch: Batch,
        *,
        seen: int | None,
        digest: bytes,
        absorb: bool,
        anew: bool,
        render: Callable[[Position, Judged | None], bytes],
    ) -> Taken:
        """Take the next flows of a stream in and answer them.

        Args:
            name: of the stream, as validated by the caller.
            batch: the flows.
            seen: flows that the client believes the service has seen; None: go on from wherever the stream is.
            digest: of the request's body and of whatever else shapes the answer (its media type).
            absorb: take the flows in without verdicts; the client has them.
            anew: forget what the stream was and begin with an empty state at `seen` (0 without).
            render: makes the answer of the new position and of what was judged (None: absorbed).

        Raises:
            SeenMismatch: the stream is elsewhere.
            StreamBusy: another request of the stream is being answered.
            TooManyStreams: the stream is not open, and no other one can be dropped for it.
            StoreError: the stream is not open, and the store does not say what it was; nothing was taken.
        """
        key = hashlib.sha256(digest + bytes([absorb, anew])).hexdigest()
        stream = self._enter(name)
        try:
            if self._is_repeated(stream, seen, batch.count, key, anew=anew):
                assert stream.last is not None
                self.counters.repeated_requests += 1
                return Taken(stream.last.answer, stream.seen, stream.durable, True, None)
            if anew:
                self._begin_anew(stream, seen or 0)
            try:
                with stream.state:
                    return self._advance(stream, batch, key, absorb=absorb, render=render)
            except BaseException:
                # the state may be half changed: the next request meets the stored one
                self._mark_gone(stream)
                raise
        finally:
            self._leave(stream)

    def status(self, name: str) -> Position | None:
        """Where a stream stands; None if there is none.

        Raises:
            StoreError: the stream is not open, and the store does not answer.
        """
        stream = self._streams.get(name)
        if stream is not None and stream.ready:
            return Position(name, stream.seen, stream.durable, stream.watch.warm)
        header = self._stored_header(name)
        return None if header is None else Position(name, header["seen"], header["seen"], header["warm"])

    def forget(self, name: str) -> None:
        """Drop a stream, and its checkpoint.

        Raises:
            StreamBusy: a request of the stream is being answered.
            StoreError: the checkpoint cannot be removed; the stream is as before.
        """
        with self._guard:
            stream = self._when_dropped(name)
            if stream is None:
                stream = self._streams[name] = self._new(name)
            elif stream.busy:
                raise StreamBusy(_BUSY)
            stream.busy = True
        try:
            with stream.io:
                self._store.delete(self._path(name))
                stream.gone = True
        finally:
            if not stream.ready:
                self._mark_gone(stream)
            self._leave(stream)

    def checkpoint(self) -> None:
        """Write every stream that has changed, now."""
        for stream in list(self._streams.values()):
            self._write(stream)

    def release(self) -> int:
        """Write and drop every stream, so that another service can go on with them; how many were dropped.

        A stream whose request takes longer than some seconds, or that cannot be written, stays.
        """
        released = 0
        deadline = time.monotonic() + _RELEASE_SECONDS
        for stream in list(self._streams.values()):
            with self._guard:
                if not self._guard.wait_for(lambda: not stream.busy, max(deadline - time.monotonic(), 0)):  # noqa: B023
                    continue
                if stream.gone:
                    continue
                stream.busy = stream.leaving = True
            if self._write_and_drop(stream):
                released += 1
        return released

    def close(self) -> None:
        """Write every stream and end the thread that does so; no request may come after."""
        self._stopping.set()
        self._due.set()
        self._writer.join()
        self.checkpoint()

    def _enter(self, name: str) -> _Stream:
        """The stream, open and marked busy."""
        with self._guard:
            stream = self._when_dropped(name)
            if stream is not None:
                if stream.busy:
                    raise StreamBusy(_BUSY)
                stream.busy = True
                self._streams[name] = self._streams.pop(name)
                return stream
            stream = self._streams[name] = self._new(name)
        try:
            self._make_room()
            self._load(stream)
            self._make_room()
            stream.ready = True
        except BaseException:
            self._mark_gone(stream)
            self._leave(stream)
            raise
        return stream

    def _when_dropped(self, name: str) -> _Stream | None:
        """The stream, or none, once the service itself no longer writes it to drop it; the caller has the guard."""

        def is_over() -> bool:
            stream = self._streams.get(name)
            return stream is None or not stream.leaving

        self._guard.wait_for(is_over, _LEAVING_SECONDS)
        return self._streams.get(name)

    def _new(self, name: str) -> _Stream:
        watch = self._detector.watch()
        return _Stream(name, watch, nbytes=watch.nbytes)

    def _leave(self, stream: _Stream) -> None:
        is_due = False
        with self._guard:
            stream.busy = stream.leaving = False
            if stream.gone:
                if self._streams.get(stream.name) is stream:
                    del self._streams[stream.name]
            else:
                is_due = stream.seen - stream.durable >= self._limits.checkpoint_flows
            self._guard.notify_all()
        if is_due:
            self._due.set()

    def _mark_gone(self, stream: _Stream) -> None:
        """The stream is no longer used nor written once its request ends."""
        with self._guard:
            stream.gone = True
            if not stream.busy and self._streams.get(stream.name) is stream:
                del self._streams[stream.name]

    def _is_repeated(self, stream: _Stream, seen: int | None, count: int, key: str, *, anew: bool) -> bool:
        """Whether this is the last request again; if not, whether it may be taken (raises SeenMismatch).

        Whoever begins a stream anew after a switch wants the new detector's verdicts; an answer that was lost across
        the switch is still the first one.
        """
        for is_fresh in (False, True):
            last = stream.last
            if last is not None and last.is_same(seen, count, key, self._detector.digest if anew else last.detector):
                return True
            if anew or seen is None or seen == stream.seen:
                return False
            if not is_fresh:
                self._refresh(stream)
        raise SeenMismatch(stream.seen, stream.durable)

    def _refresh(self, stream: _Stream) -> None:
        """Go on from the stored checkpoint if another service went further."""
        try:
            header = self._stored_header(stream.name)
            if header is not None and (header["generation"], header["seen"]) > stream.order:
                self.counters.fenced += 1
                self._load(stream)
        except StoreError as error:
            _log.warning("stream %s: %s", stream.name, error)

    def _begin_anew(self, stream: _Stream, seen: int) -> None:
        with stream.io, stream.state:
            stream.gone = False  # if another service went further: no longer
            stream.watch = self._detector.watch()
            stream.watch.stream.seen = stream.seen = stream.durable = seen
            stream.generation = max(stream.generation + 1, time.time_ns())
            stream.last = None
            self._changed(stream)
        # what was stored must not come back after a restart
        self._write(stream)

    def _advance(
        self,
        stream: _Stream,
        batch: Batch,
        key: str,
        *,
        absorb: bool,
        render: Callable[[Position, Judged | None], bytes],
    ) -> Taken:
        taken = stream.watch.take(batch.columns)
        judged = None if absorb else taken
        before, stream.seen = stream.seen, stream.seen + batch.count
        stream.watch.stream.seen = stream.seen
        answer = render(Position(stream.name, stream.seen, stream.durable, stream.watch.warm), judged)
        if batch.count:
            stream.last = _Last(before, batch.count, key, answer, self._detector.digest)
            self._changed(stream)
        if absorb:
            self.counters.resent_flows += batch.count
        return Taken(answer, stream.seen, stream.durable, False, judged)

    def _changed(self, stream: _Stream) -> None:
        if stream.saved == stream.changes:
            stream.unsaved_since = time.monotonic()
        stream.changes += 1
        stream.nbytes = stream.watch.nbytes + (len(stream.last.answer) if stream.last else 0)

    def _make_room(self) -> None:
        """Write and drop the oldest idle streams until the limits hold."""
        is_failing = False
        while True:
            with self._guard:
                held = sum(stream.nbytes for stream in self._streams.values())
                is_full = len(self._streams) > self._limits.streams
                if len(self._streams) <= 1 or not (is_full or held > self._limits.memory_bytes):
                    return
                idle = (stream for stream in self._streams.values() if not stream.busy)
                oldest = next((s for s in idle if s.saved == s.changes or not is_failing), None)
                if oldest is None:
                    raise TooManyStreams("no further stream can be opened now: try again later")
                oldest.busy = oldest.leaving = True
            if self._write_and_drop(oldest):
                self.counters.evictions += 1
            else:
                is_failing = True

    def _write_and_drop(self, stream: _Stream) -> bool:
        """Write and drop a stream that the caller marked busy; whether it could be written."""
        try:
            is_saved = self._write(stream)
            if is_saved:
                self._mark_gone(stream)
            return is_saved
        finally:
            self._leave(stream)

    def _write_when_due(self) -> None:
        pause = min(max(self._limits.checkpoint_seconds / 5, 0.02), 1.0)
        while not self._stopping.is_set():
            self._due.wait(pause)
            self._due.clear()
            for stream in list(self._streams.values()):
                if self._stopping.is_set() or not self._is_due(stream):
                    continue
                begin = time.monotonic()
                try:
                    self._write(stream)
                except Exception:
                    _log.exception("stream %s: its checkpoint failed", stream.name)
                    stream.retry_at = time.monotonic() + self._limits.checkpoint_seconds
                self._stopping.wait((time.monotonic() - begin) * _REST)
            with suppress(TooManyStreams):  # all are busy, or the store fails: the next round tries again
                self._make_room()

    def _is_due(self, stream: _Stream) -> bool:
        now = time.monotonic()
        if stream.saved == stream.changes or now < stream.retry_at:
            return False
        has_many = stream.seen - stream.durable >= self._limits.checkpoint_flows
        return has_many or now - stream.unsaved_since >= self._limits.checkpoint_seconds

    def _write(self, stream: _Stream) -> bool:
        """Write a stream's checkpoint if it has changed; whether nothing is left unwritten."""
        with stream.io:
            if stream.gone or stream.saved == stream.changes:
                return True
            begin = time.monotonic()
            with stream.state:
                changes, seen, last, order = stream.changes, stream.seen, stream.last, stream.order
                warm = stream.watch.warm
                snapshot = stream.watch.snapshot()
            content = _pack(
                self._identity(stream.name) | {"generation": order[0], "seen": seen, "warm": warm},
                snapshot.to_bytes(),
                last,
            )
            try:
                header = self._stored_header(stream.name)
                if header is not None and (header["generation"], header["seen"]) > order:
                    _log.warning("stream %s: another service went further; the state here is dropped", stream.name)
                    self.counters.fenced += 1
                    self._mark_gone(stream)
                    return True
                self._store.write(self._path(stream.name), content)
            except StoreError as error:
                self.counters.checkpoint_failures += 1
                stream.retry_at = time.monotonic() + self._limits.checkpoint_seconds
                if not stream.failing:
                    _log.warning("stream %s: %s; durable stays at %d", stream.name, error, stream.durable)
                stream.failing = True
                return False
            with stream.state:
                stream.saved, stream.durable = changes, seen
                stream.unsaved_since = begin
            if stream.failing:
                _log.info("stream %s: written again", stream.name)
            stream.failing = False
            self.counters.checkpoints += 1
            self.counters.checkpoint_seconds += time.monotonic() - begin
            return stream.saved == stream.changes

    def _load(self, stream: _Stream) -> None:
        """Read the stored checkpoint into a stream that the caller marked busy; a useless one is set aside."""
        with stream.io:
            path = self._path(stream.name)
            content = self._store.read(path)
            if content is None:
                return
            try:
                checkpoint = _unpack(content)
                _check_identity(checkpoint.header, self._identity(stream.name))
                watch = Watch.load(self._detector, checkpoint.state)
            except StoreError as error:
                _log.warning("stream %s: %s; it is set aside, the stream begins anew", stream.name, error)
                self._store.write(f"{path}.damaged", content)
                self._store.delete(path)
                self.counters.set_aside += 1
                return
            with stream.state:
                stream.watch = watch
                stream.generation, stream.seen = checkpoint.header["generation"], checkpoint.header["seen"]
                stream.last = checkpoint.last
                self._changed(stream)
                stream.saved, stream.durable = stream.changes, stream.seen

    def _stored_header(self, name: str) -> dict[str, Any] | None:
        """Of the stored checkpoint; None if there is none that could be used."""
        content = self._store.read(self._path(name), _MOST_HEADER_BYTES)
        if content is None:
            return None
        try:
            header = _unpack_header(content)[0]
            _check_identity(header, self._identity(name))
        except StoreError:
            return None
        return header

    def _identity(self, name: str) -> dict[str, Any]:
        manifest = self._detector.manifest
        return {"stream": name, "view": manifest.name, "view_version": manifest.version}

    def _path(self, name: str) -> str:
        manifest = self._detector.manifest
        return f"{manifest.name}-{manifest.version}/{name}.state"


_BUSY: Final = "another request of this stream is being answered"


def _pack(header: dict[str, Any], state: bytes, last: _Last | None) -> bytes:
    """A checkpoint: magic, SHA-256 of the rest, length of the header, header (JSON), state, answer."""
    answer = zlib.compress(last.answer, 1) if last else b""
    request = last and {"seen": last.seen, "count": last.count, "digest": last.digest, "detector": last.detector}
    header = header | {
        "state_bytes": len(state),
        "answer_bytes": len(last.answer) if last else 0,
        "last": request,
    }
    text = json.dumps(header).encode()
    rest = b"".join((len(text).to_bytes(4, "big"), text, state, answer))
    return b"".join((_MAGIC, hashlib.sha256(rest).digest(), rest))


def _unpack_header(content: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the state begins."""
    begin = len(_MAGIC) + _DIGEST_BYTES + 4
    length = int.from_bytes(content[begin - 4 : begin], "big")
    if not content.startswith(_MAGIC) or begin + length > min(len(content), _MOST_HEADER_BYTES):
        raise StoreError("not a checkpoint of a stream")
    try:
        header = json.loads(content[begin : begin + length])
        numbers = [header[name] for name in ("seen", "generation", "state_bytes", "answer_bytes")]
        texts = []
        if header["last"] is not None:
            numbers += [header["last"][name] for name in ("seen", "count")]
            texts = [header["last"][name] for name in ("digest", "detector")]
        is_sound = all(type(number) is int and 0 <= number <= _MOST_SEEN for number in numbers)
        if not is_sound or not all(type(text) is str for text in texts) or type(header["warm"]) is not bool:
            raise StoreError("not the header of a checkpoint")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError("not the header of a checkpoint") from error
    return header, begin + length


def _unpack(content: bytes) -> _Checkpoint:
    header, begin = _unpack_header(content)
    hashed = len(_MAGIC) + _DIGEST_BYTES
    if hashlib.sha256(memoryview(content)[hashed:]).digest() != content[len(_MAGIC) : hashed]:
        raise StoreError("its checkpoint is damaged")
    end = begin + header["state_bytes"]
    last = header["last"]
    if last is not None:
        answer = _decompressed(content[end:], header["answer_bytes"])
        last = _Last(last["seen"], last["count"], last["digest"], answer, last["detector"])
    return _Checkpoint(header, content[begin:end], last)


def _decompressed(content: bytes, length: int) -> bytes:
    """What was compressed to `content`, if it has this length."""
    try:
        # one more byte than expected, as a limit of 0 would be none
        answer = zlib.decompressobj().decompress(content, min(length, _MOST_ANSWER_BYTES) + 1)
    except zlib.error as error:
        raise StoreError("its checkpoint holds no readable answer") from error
    if len(answer) != length:
        raise StoreError("its checkpoint holds another answer than it says")
    return answer


def _check_identity(header: dict[str, Any], identity: dict[str, Any]) -> None:
    for name, value in identity.items():
        if header.get(name) != value:
            raise StoreError(f"a checkpoint of another {name.replace('_', ' ')}")
