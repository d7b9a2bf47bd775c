"""The HTTP interface of the service, as a bare ASGI application.

A framework's layers cost more than the verdict of a flow. What is small and needs no store is answered on the event
loop at once; the rest in a few threads, so that other streams go on. Nothing of a request is ever repeated in an
error or a log, except names of streams, which have an alphabet of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import numpy as np
import orjson
import pyarrow as pa

from flowsentry.detector import Detector, Judged
from flowsentry.errors import FlowSentryError, StoreError
from flowsentry.serving import wire
from flowsentry.serving.metrics import MEDIA_TYPE as METRICS_TYPE
from flowsentry.serving.metrics import Metrics
from flowsentry.serving.protocol import ARROW, DURABLE_HEADER, JSON, NDJSON, SEEN_HEADER, STREAM_HEADER, SeenMismatch
from flowsentry.serving.schema import PROBLEMS
from flowsentry.serving.settings import Settings
from flowsentry.serving.store import FolderStore
from flowsentry.serving.streams import Limits, Position, StreamBusy, Streams, Taken, TooManyStreams

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

INLINE_BYTES: Final = 32 << 10
"""A longer body is parsed in a thread: some hundred flows take as long as an answer may be late for others."""
THREADS: Final = 4
_IGNORED_BYTES: Final = 64 << 10
"""A longer body that is not wanted ends the connection instead of being read."""
LONG_BYTES: Final = 1 << 20
"""Of longer bodies one is answered at a time: each may take many times its length in memory, and seconds."""
_BODIES_AT_ONCE: Final = 8
"""Longest bodies that may be in memory at the same time; what comes beyond is told to come again."""
RELEASED_SECONDS: Final = 60.0
"""For so long after a release each answer ends its connection: the next request may belong elsewhere."""
_STREAM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WHOLE: Final = re.compile("[0-9]{1,15}")
_FLAGS: Final = {"true": True, "false": False}
_BAD: Final = {"reject_rows": False, "reject_batch": True}
_PROBLEM: Final = b"application/problem+json"
_QUIET_SECONDS: Final = 1.0
"""A refused request is logged at most so often for each route and status."""
_log: Final = logging.getLogger("flowsentry.service")
_T = TypeVar("_T")


class Problem(Exception):
    """A request is answered with an error."""

    def __init__(self, code: str, detail: str, headers: Headers | None = None, **members: Any) -> None:
        super().__init__(code)
        self.status, title = PROBLEMS[code]
        self.headers = headers or []
        self.body = orjson.dumps({"title": title, "status": self.status, "code": code, "detail": detail, **members})


class _Gone(Exception):
    """The client has gone away; nobody reads an answer."""


@dataclass(frozen=True)
class Model:
    """What answers."""

    detector: Detector
    version: str
    digest: str
    """Of the bundle; empty outside one."""

    @classmethod
    def load(cls, folder: Path) -> Model:
        """The model of a bundle.

        Args:
            folder: with `bundle.json` and `detector/`; the bundle's sums are in the folder above.

        Raises:
            StoreError: something is missing or damaged, or `detector/` is not what was bundled.
        """
        try:
            about = orjson.loads((folder / "bundle.json").read_bytes())
            version, expected = str(about["model_version"]), about["detector_digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder}: not the code of a bundle ({type(error).__name__}: bundle.json)") from error
        detector = Detector.load(folder / "detector")
        if detector.digest != expected:
            raise StoreError(f"{folder / 'detector'}: not the detector that was bundled; build the bundle again")
        sums = folder.parent / "SHA256SUMS"
        return cls(detector, version, hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else "")

    def described(self) -> bytes:
        """Body of GET /v1/model."""
        detector = self.detector
        return orjson.dumps(
            {
                "model_version": self.version,
                "digest": self.digest,
                "detector_digest": detector.digest,
                "view": detector.manifest.name,
                "view_version": detector.manifest.version,
                "threshold": detector.limit,
                "target_fpr": detector.target_fpr,
                "needs_effect": detector.needs_effect,
                "manifest": detector.manifest.model_dump(mode="json"),
                "card": detector.card,
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )


@dataclass(slots=True)
class _Request:
    receive: Receive
    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    route: str = "other"
    """Template of the path, for metrics and logs."""
    held: int = 0
    """Bytes of the body that count as being in memory."""
    stream: str | None = None
    flows: int | None = None
    rejected: int | None = None


@dataclass(slots=True)
class _Query:
    stream: str = "default"
    seen: int | None = None
    absorb: bool = False
    anew: bool = False
    reject_batch: bool = False


@dataclass(slots=True)
class _Answer:
    status: int
    body: bytes
    headers: Headers
    media_type: bytes = b"application/json"


@dataclass(frozen=True)
class _Route:
    template: str
    methods: tuple[str, ...]
    answer: Callable[[_Request], Awaitable[_Answer]]


class App:
    """All routes below /v1, and /metrics."""

    def __init__(self, model: Model, streams: Streams, settings: Settings, openapi: bytes) -> None:
        self._model = model
        self._streams = streams
        self._settings = settings
        manifest = model.detector.manifest
        self.metrics = Metrics(model.version, manifest.name, manifest.version, model.digest)
        self._token = None if settings.token is None else b"bearer " + settings.token.encode()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="requests")
        self._held = 0
        self._long = asyncio.Semaphore()
        self._quiet: dict[tuple[str, int], tuple[float, int]] = {}
        self._released = -RELEASED_SECONDS
        described = model.described()
        self._routes = {
            "/v1/verdicts": _Route("/v1/verdicts", ("POST",), self._verdicts),
            "/v1/release": _Route("/v1/release", ("POST",), self._release),
            "/v1/model": _fixed("/v1/model", described),
            "/v1/openapi.json": _fixed("/v1/openapi.json", openapi),
            "/metrics": _Route("/metrics", ("GET", "HEAD"), self._metrics),
        }
        self._stream_route = _Route("/v1/streams/{stream}", ("GET", "HEAD", "DELETE"), self._stream)

    def close(self) -> None:
        """End the threads; no request may come after."""
        self._threads.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of ASGI's type `http`."""
        begin = time.perf_counter()
        method = scope["method"] if scope["method"] in _METHODS else "other"
        request = _Request(receive, method, scope["path"], scope["query_string"], dict(scope["headers"]))
        try:
            answer = await self._answer(request)
        except Problem as problem:
            answer = _Answer(problem.status, problem.body, problem.headers, _PROBLEM)
        except _Gone:
            return
        except Exception as error:
            _log.error("request failed", extra={"fields": {"path": request.route, **_place(error)}})
            internal = Problem("internal", "the request could not be answered")
            answer = _Answer(internal.status, internal.body, _ending(request), _PROBLEM)
        finally:
            self._held -= request.held
        seconds = time.perf_counter() - begin
        self.metrics.answered(method, request.route, answer.status, seconds)
        if answer.status >= 400 or self._settings.access_log == "on":
            self._write_log(request, answer.status, seconds)
        headers = answer.headers
        if time.monotonic() - self._released < RELEASED_SECONDS and _ENDING[0] not in headers:
            headers = [*_ENDING, *headers]
        if answer.status != 204:
            headers = [
                (b"content-length", b"%d" % len(answer.body)),
                (b"content-type", answer.media_type),
                *headers,
            ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else answer.body})

    async def _answer(self, request: _Request) -> _Answer:
        path = request.path
        route = self._routes.get(path)
        if route is None and path.startswith("/v1/streams/"):
            route = self._stream_route
        if route is not None:
            request.route = route.template
        if self._token is not None and path != "/metrics":
            kind, _, token = request.headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + token, self._token):
                headers = [(b"www-authenticate", b"Bearer"), *_ending(request)]
                raise Problem("unauthorized", "the bearer token is missing or another one", headers)
        if route is None:
            raise Problem("not_found", "there is nothing at this path", _ending(request))
        if request.method not in route.methods:
            allow = (b"allow", ", ".join((*route.methods, "OPTIONS")).encode())
            if request.method == "OPTIONS":
                return _Answer(204, b"", [allow])
            raise Problem("method_not_allowed", "the method is not allowed here", [allow, *_ending(request)])
        return await route.answer(request)

    async def _verdicts(self, request: _Request) -> _Answer:
        query = _query(request)
        request.stream = query.stream
        media_type = _media_type(request)
        answer_type = _answer_type(request, media_type)
        body = await self._body(request)
        task = (query, body, media_type, answer_type)
        if len(body) <= INLINE_BYTES and self._is_at_hand(query):
            batch, taken = self._take(*task)
        else:
            async with self._long if len(body) > LONG_BYTES else nullcontext():
                batch, taken = await self._in_thread(self._take, *task)
        request.flows, request.rejected = batch.count, len(batch.rejected)
        if taken is None:
            self.metrics.refused(batch.rejected)
            rejected = [{"index": index, "reason": reason} for index, reason in batch.rejected]
            raise Problem("bad_flows", "nothing was taken: there are bad flows", rejected=rejected)
        if taken.judged is not None:
            self.metrics.judged(batch.count, taken.judged, batch.rejected)
        headers = [
            (_STREAM_HEADER, query.stream.encode()),
            (_SEEN_HEADER, b"%d" % taken.seen),
            (_DURABLE_HEADER, b"%d" % taken.durable),
        ]
        return _Answer(200, taken.answer, headers, answer_type.encode())

    def _is_at_hand(self, query: _Query) -> bool:
        """Whether the stream goes on from memory, without a look into the store."""
        if query.anew or not self._streams.is_open(query.stream):
            return False
        position = None if query.seen is None else self._streams.status(query.stream)
        return position is None or position.seen == query.seen

    def _take(self, query: _Query, body: bytes, media_type: str, answer_type: str) -> tuple[wire.Batch, Taken | None]:
        """Parse, judge and write the answer; None if bad flows refuse the batch."""
        try:
            now_ms = time.time_ns() // 1_000_000
            batch = wire.parse(body, media_type, max_flows=self._settings.flows, now_ms=now_ms)
        except wire.Malformed as malformed:
            raise Problem(malformed.code, malformed.detail) from None
        if query.reject_batch and batch.rejected:
            return batch, None

        def render(position: Position, judged: Judged | None) -> bytes:
            model, manifest = self._model, self._model.detector.manifest
            place = (position.stream, position.seen, position.durable)
            head = wire.Head(*place, model.version, manifest.name, manifest.version, model.detector.limit)
            return wire.answer(answer_type, head, judged, batch)

        digest = hashlib.sha256(body)
        digest.update(f"\n{media_type} {answer_type}".encode())
        try:
            taken = self._streams.take(
                query.stream,
                batch,
                seen=query.seen,
                digest=digest.digest(),
                absorb=query.absorb,
                anew=query.anew,
                render=render,
            )
        except FlowSentryError as error:
            raise _problem(error) from error
        return batch, taken

    async def _stream(self, request: _Request) -> _Answer:
        _no_query(request)
        name = request.path.removeprefix("/v1/streams/")
        if not _STREAM.fullmatch(name):
            raise Problem("not_found", "there is no stream of this name")
        request.stream = name
        try:
            if request.method == "DELETE":
                await self._in_thread(self._streams.forget, name)
                return _Answer(204, b"", [])
            position = await self._in_thread(self._streams.status, name)
        except FlowSentryError as error:
            raise _problem(error) from error
        if position is None:
            raise Problem("not_found", "there is no stream of this name")
        return _Answer(200, orjson.dumps(position), [])

    async def _release(self, request: _Request) -> _Answer:
        _no_query(request)
        self._released = time.monotonic()
        return _Answer(200, orjson.dumps({"streams": await self._in_thread(self._streams.release)}), [])

    async def _metrics(self, request: _Request) -> _Answer:
        return _Answer(200, self.metrics.text(self._streams), [], METRICS_TYPE.encode())

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _body(self, request: _Request) -> bytes:
        """The whole body, within its limits of size and time."""
        most = self._settings.body_bytes
        declared = request.headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > 2 * most:
            raise _too_large(most, _ENDING)
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                piece, has_more = await _piece(request)
                if has_more:
                    piece = await self._rest(request, piece, most)
        except TimeoutError:
            raise Problem("timeout", "the body did not come in time", _ENDING) from None
        if len(piece) > most:
            raise _too_large(most, [])
        return piece

    async def _rest(self, request: _Request, piece: bytes, most: int) -> bytes:
        """The body that begins with a piece; a little too much is still read, so that the client reads the answer."""
        pieces, size, has_more = [piece], len(piece), True
        while has_more and size <= 2 * most:
            self._held -= request.held
            request.held = min(size, most)
            self._held += request.held
            if self._held > _BODIES_AT_ONCE * most:
                raise Problem("busy", "too many long bodies at once", [_AGAIN, *_ENDING])
            piece, has_more = await _piece(request)
            size += len(piece)
            if size <= most:
                pieces.append(piece)
        if has_more:
            raise _too_large(most, _ENDING)
        if size > most:
            raise _too_large(most, [])
        return b"".join(pieces)

    def _write_log(self, request: _Request, status: int, seconds: float) -> None:
        fields: dict[str, Any] = {"method": request.method, "path": request.route, "status": status}
        if self._settings.access_log == "off" and status != 500:
            key, now = (request.route, status), time.monotonic()
            last, times = self._quiet.get(key, (-_QUIET_SECONDS, 0))
            if now - last < _QUIET_SECONDS:
                self._quiet[key] = (last, times + 1)
                return
            self._quiet[key] = (now, 0)
            fields["unlogged_before"] = times
        given = {"stream": request.stream, "flows": request.flows, "rejected": request.rejected}
        fields |= {name: value for name, value in given.items() if value is not None}
        fields["ms"] = round(1000 * seconds, 3)
        level = logging.INFO if status < 400 else logging.ERROR if status == 500 else logging.WARNING
        _log.log(level, "request", extra={"fields": fields})


def rehearse(model: Model) -> None:
    """Send two flows of every type through an application of its own: nothing is compiled or loaded later.

    Nothing of it reaches the service's metrics or store.
    """
    seconds = 1_600_000_000
    flow = {"src_ip": "192.0.2.1", "dst_ip": "192.0.2.2", "src_port": 40_000, "dst_port": 80, "transport": "tcp"}
    flows = [
        {"flow_id": f"rehearsal {size}", **flow, "bytes": size, "duration": 0, "time": 1000 * seconds, "final": True}
        for size in (60, 6000)
    ]
    table = pa.Table.from_pylist([{**flow, "time": datetime.fromtimestamp(seconds, UTC)} for flow in flows])
    arrow = pa.BufferOutputStream()
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    bodies = {
        JSON: orjson.dumps({"flows": flows}),
        NDJSON: b"\n".join(map(orjson.dumps, flows)),
        ARROW: arrow.getvalue().to_pybytes(),
    }
    with tempfile.TemporaryDirectory() as folder:
        streams = Streams(model.detector, FolderStore(Path(folder)), Limits())
        app = App(model, streams, Settings(state=folder), b"")
        try:
            for media_type, body in bodies.items():
                batch, taken = app._take(_Query(), body, media_type, media_type)
                if batch.rejected or taken is None or taken.judged is None:
                    raise StoreError("the detector does not judge plain flows; build the bundle again")
                app.metrics.judged(batch.count, taken.judged, batch.rejected)
                taken.judged.reasons(np.arange(batch.count))
            app.metrics.text(streams)
        finally:
            app.close()
            streams.close()


def _fixed(path: str, body: bytes) -> _Route:
    async def answer(request: _Request) -> _Answer:
        _no_query(request)
        return _Answer(200, body, [])

    return _Route(path, ("GET", "HEAD"), answer)


_STREAM_HEADER, _SEEN_HEADER, _DURABLE_HEADER = (
    name.lower().encode() for name in (STREAM_HEADER, SEEN_HEADER, DURABLE_HEADER)
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ENDING: Final[Headers] = [(b"connection", b"close")]
_AGAIN: Final = (b"retry-after", b"1")


def _ending(request: _Request) -> Headers:
    """For an answer before the body was read: a long one ends the connection instead."""
    declared = request.headers.get(b"content-length", b"0")
    is_short = declared.isdigit() and int(declared) <= _IGNORED_BYTES and b"transfer-encoding" not in request.headers
    return [] if is_short else _ENDING


def _too_large(most: int, headers: Headers) -> Problem:
    return Problem("too_large", f"the body is longer than {most} bytes", headers)


async def _piece(request: _Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] != "http.request":
        raise _Gone
    return message.get("body", b""), message.get("more_body", False)


def _no_query(request: _Request) -> None:
    if request.query:
        raise Problem("invalid", "there are no query parameters here")


def _query(request: _Request) -> _Query:
    """Query parameters of a request for verdicts; every other or repeated one is refused."""
    query = _Query()
    given: set[str] = set()
    for pair in request.query.decode("latin-1").split("&") if request.query else ():
        name, _, value = pair.partition("=")
        if "%" in value:
            value = unquote(value, "latin-1")
        if name in given:
            raise Problem("invalid", "a query parameter is there twice", _ending(request))
        given.add(name)
        match name:
            case "stream" if _STREAM.fullmatch(value):
                query.stream = value
            case "seen" if _WHOLE.fullmatch(value):
                query.seen = int(value)
            case "absorb" if value in _FLAGS:
                query.absorb = _FLAGS[value]
            case "anew" if value in _FLAGS:
                query.anew = _FLAGS[value]
            case "on_bad" if value in _BAD:
                query.reject_batch = _BAD[value]
            case "stream" | "seen" | "absorb" | "anew" | "on_bad":
                raise Problem("invalid", f"the query parameter {name} has an impossible value", _ending(request))
            case _:
                raise Problem("invalid", "a query parameter is unknown", _ending(request))
    return query


def _media_type(request: _Request) -> str:
    """Of the body: one of wire's."""
    media_type = _KNOWN_TYPES.get(request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower())
    if media_type is None:
        detail = f"the body must be one of {', '.join(wire.MEDIA_TYPES)}"
        raise Problem("unsupported_media_type", detail, _ending(request))
    if request.headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise Problem("unsupported_media_type", "the body must not be compressed", _ending(request))
    return media_type


def _answer_type(request: _Request, media_type: str) -> str:
    """The first type of Accept that can be written, else the body's."""
    accept = request.headers.get(b"accept", b"*/*")
    if accept != b"*/*":
        for part in accept.lower().split(b","):
            known = _KNOWN_TYPES.get(part.partition(b";")[0].strip())
            if known is not None:
                return known
    return media_type


_KNOWN_TYPES: Final = {name.encode(): name for name in wire.MEDIA_TYPES}


def _problem(error: FlowSentryError) -> Problem:
    """What the protocol of streams answers."""
    match error:
        case SeenMismatch():
            detail = "the stream has seen another number of flows: send again from there"
            return Problem("seen_mismatch", detail, seen=error.seen, durable=error.durable)
        case StreamBusy():
            return Problem("stream_busy", "another request of the stream is being answered", [_AGAIN])
        case TooManyStreams():
            return Problem("busy", "no further stream can be opened now", [_AGAIN])
        case StoreError():
            _log.error("store failed", extra={"fields": {"error": str(error)}})
            return Problem("busy", "the store of checkpoints does not answer", [_AGAIN])
        case _:
            raise error


def _place(error: BaseException) -> dict[str, Any]:
    """Type and place of an error; its text may hold a part of the request."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "traceback": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }
