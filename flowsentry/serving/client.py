"""Clients of a service: plain requests (`Client`), and a stream of flows that loses no verdict (`StreamClient`).

`http.client` and not httpx: 83 us a request instead of 417 on one connection of one machine, and nothing to install.
"""

from __future__ import annotations

import http.client
import io
import random
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import orjson
import pandas as pd

from flowsentry.errors import ConfigError, ServiceError
from flowsentry.serving.protocol import ARROW, DURABLE_HEADER, JSON, NDJSON, SEEN_HEADER, SeenMismatch

Flows = pd.DataFrame | Sequence[Mapping[str, Any]]
"""Canonical reports, or flows as the interface has them (JSON and NDJSON only)."""

WIRE_COLUMNS: Final = (
    "flow_id", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "duration", "time", "final", "packets",
)  # fmt: skip
"""What a flow has on the wire."""

_MAX_ANSWER_BYTES: Final = 1 << 29
_IDLE_SECONDS: Final = 2.0
"""A connection that was idle for longer is not used again: servers close it, uvicorn after 5 s, and a request that
meets the end of a connection may have been taken or not."""
_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0
_PASSING: Final = {408, 423, 502, 503, 504}
"""Answers that a later attempt may do without."""
_NOT_TAKEN: Final = {423, 503}
"""Those after which the service has certainly taken nothing."""
_MAX_MISMATCHES: Final = 50
"""Positions that a stream may lose in one request: a service that restarts again and again."""


@dataclass(frozen=True)
class Reply:
    """An answer to flows."""

    body: bytes
    media_type: str
    seen: int
    durable: int


@dataclass(frozen=True)
class Answers:
    """The answers to the flows of one call."""

    first: int
    """Position of the first flow in its stream."""
    count: int
    reply: Reply | None
    """None if there were no flows."""

    def rows(self) -> list[dict[str, Any]]:
        """One for each flow, in order: a verdict, or `{"index", "rejected": reason}`.

        Raises:
            ServiceError: the service did not answer every flow once.
        """
        rows = [] if self.reply is None else _rows(self.reply)
        if [row.get("index") for row in rows] != list(range(self.count)):
            raise ServiceError("the service did not answer every flow once: is it another version?")
        return rows


class Client:
    """Blocking requests to one service, over one connection that is kept. For one thread at a time."""

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 30.0, patience: float = 60.0) -> None:
        """Nothing is sent yet.

        Args:
            url: of the service, http or https.
            token: bearer token.
            timeout: seconds that one read or write may take.
            patience: seconds that a request is tried again when the service is busy or not there.

        Raises:
            ConfigError: the URL is none of a service.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or port == -1:
            raise ConfigError("the address of a service is http://host:port, or https; its token is given apart")
        self.url = url.rstrip("/")
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = timeout
        self._patience = patience
        self._connection: http.client.HTTPConnection | None = None
        self._used = 0.0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def post_verdicts(
        self,
        body: bytes,
        *,
        media_type: str = JSON,
        accept: str | None = None,
        stream: str = "default",
        seen: int | None = None,
        absorb: bool = False,
        anew: bool = False,
        on_bad: str = "reject_rows",
    ) -> Reply:
        """`POST /v1/verdicts`. Without `seen` it is tried again only if the service has surely not taken the flows.

        Raises:
            SeenMismatch: the stream is elsewhere.
            ServiceError: the service refuses, or is not there for longer than the client's patience.
        """
        query = {"stream": stream, "absorb": _text(absorb), "anew": _text(anew), "on_bad": on_bad}
        if seen is not None:
            query["seen"] = str(seen)
        headers = {"Content-Type": media_type, "Accept": accept or media_type}
        answer = self._request("POST", f"/v1/verdicts?{urlencode(query)}", body, headers, is_safe=seen is not None)
        problem = _problem(answer)
        if answer.status == 409 and problem.get("code") == "seen_mismatch":
            raise SeenMismatch(_count(problem.get("seen")), _count(problem.get("durable")))
        self._expect(answer, 200)
        return Reply(
            answer.body,
            answer.headers.get_content_type(),
            _count(answer.headers.get(SEEN_HEADER)),
            _count(answer.headers.get(DURABLE_HEADER)),
        )

    def model(self) -> dict[str, Any]:
        """`GET /v1/model`.

        Raises:
            ServiceError: the service refuses, or is not there.
        """
        return self._expect(self._request("GET", "/v1/model"), 200)

    def stream_status(self, stream: str) -> dict[str, Any] | None:
        """`GET /v1/streams/NAME`; None if the service knows no such stream.

        Raises:
            ServiceError: the service refuses, or is not there.
        """
        answer = self._request("GET", f"/v1/streams/{quote(stream, safe='')}")
        return None if answer.status == 404 else self._expect(answer, 200)

    def delete_stream(self, stream: str) -> None:
        """`DELETE /v1/streams/NAME`.

        Raises:
            ServiceError: the service refuses, or is not there.
        """
        answer = self._request("DELETE", f"/v1/streams/{quote(stream, safe='')}")
        if answer.status != 404:
            self._expect(answer, 204)

    def release(self) -> int:
        """`POST /v1/release`: how many streams were written and dropped.

        Raises:
            ServiceError: the service refuses, or is not there.
        """
        return _count(self._expect(self._request("POST", "/v1/release"), 200).get("streams"))

    def ready(self) -> bool:
        """Whether the service is there and warm, now; never raises."""
        try:
            return self._once("GET", "/readyz", None, {}).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        is_safe: bool = True,
    ) -> _Answer:
        """Send until there is an answer that stays; `is_safe`: sending twice does no harm."""
        deadline = time.monotonic() + self._patience
        pause = _FIRST_PAUSE_SECONDS
        if time.monotonic() - self._used > _IDLE_SECONDS:
            self.close()
        while True:
            wait, failure = pause, ""
            is_new = self._connection is None
            try:
                answer = self._once(method, path, body, headers or {})
                self._used = time.monotonic()
                if answer.status not in (_PASSING if is_safe else _NOT_TAKEN):
                    return answer
                failure = f"answers {answer.status}"
                with suppress(ValueError):
                    wait = max(wait, min(float(answer.headers.get("Retry-After", "")), 5.0))
            except (OSError, http.client.HTTPException) as error:
                if not is_safe and not isinstance(error, ConnectionRefusedError):
                    raise ServiceError(
                        f"{self.url}: the connection broke before the answer ({_reason(error)}); whether the flows "
                        "were taken is not known: name `seen` to be able to send them again"
                    ) from error
                failure = f"does not answer ({_reason(error)})"
                if not is_new and not isinstance(error, TimeoutError):
                    wait = 0.0  # most likely the service had closed the idle connection
            if time.monotonic() + wait > deadline:
                raise ServiceError(f"{self.url}: the service {failure}, tried for {self._patience:g} s")
            time.sleep(wait * random.uniform(0.8, 1.2))
            if wait:
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> _Answer:
        if self._connection is None:
            if self._tls is not None:
                self._connection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=self._timeout, context=self._tls
                )
            else:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            if self._connection.sock is None:
                self._connection.connect()
            with suppress(
                BrokenPipeError, ConnectionResetError
            ):  # a refusal may be there before the whole body is sent
                self._connection.request(method, self._prefix + path, body, {**headers, **self._authorization})
            response = self._connection.getresponse()
            content = response.read(_MAX_ANSWER_BYTES)
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
            if response.will_close:
                self.close()
            return _Answer(response.status, response.headers, content)
        except BaseException:
            self.close()
            raise

    def _expect(self, answer: _Answer, status: int) -> dict[str, Any]:
        """The JSON object of an answer; empty for verdicts, which are not read here."""
        if answer.status == status:
            return answer.json() if status == 200 else {}
        if 300 <= answer.status < 400:
            raise ServiceError(f"{self.url}: the service redirects; give its own address")
        problem = _problem(answer)
        code, detail = (ascii(str(problem.get(name, ""))[:300]) for name in ("code", "detail"))
        raise ServiceError(f"{self.url}: the service answers {answer.status}, {code}: {detail}")


class Poster(Protocol):
    """What a StreamClient needs of a Client."""

    def post_verdicts(self, body: bytes, *, media_type: str, stream: str, seen: int, absorb: bool, anew: bool) -> Reply:
        """See `Client.post_verdicts`."""


class StreamClient:
    """Sends the flows of one stream in order and gets exactly one answer for each, whatever happens between.

    Flows are kept until a restart of the service would remember them. A service that has lost some gets them again, to
    be absorbed without verdicts.
    """

    def __init__(
        self,
        client: Poster,
        stream: str,
        *,
        media_type: str = JSON,
        seen: int = 0,
        before: Flows | None = None,
        keep: int = 1_000_000,
        resend: int = 10_000,
        anew: bool = False,
    ) -> None:
        """Nothing is sent yet.

        Args:
            client: of the service.
            stream: its name.
            media_type: of requests and answers.
            seen: flows of the stream that have their answers already, from an earlier client.
            before: the last of those, to be sent again should the service have lost them.
            keep: most flows to keep.
            resend: flows in one request when they are sent again.
            anew: if the service is ahead, or further behind than what is kept, the stream begins anew with what is
                kept; otherwise that is an error.
        """
        self.stream = stream
        self.seen = seen
        """Flows that have their answers."""
        self.resent = 0
        """Flows that were sent again."""
        self._client = client
        self._media_type = media_type
        self._keep = keep
        self._resend = resend
        self._anew = anew
        self._kept: deque[Flows] = deque()
        self._start = seen
        """Position of the first kept flow."""
        if before is not None and len(before):
            self._kept.append(before)
            self._start -= len(before)
            if self._start < 0:
                raise ValueError("more flows before than seen")

    @property
    def kept(self) -> int:
        """Flows that could be sent again."""
        return self.seen - self._start

    def send(self, flows: Flows) -> Answers:
        """Send the next flows in one request, and wait for their answers.

        After a ServiceError none of these flows counts as answered: call again with the same ones.

        Raises:
            ServiceError: the service refuses, is not there, or is where the stream cannot go on from.
        """
        count = len(flows)
        if count == 0:
            return Answers(self.seen, 0, None)
        body = encode(flows, self._media_type)
        anew = False
        for _ in range(_MAX_MISMATCHES):
            try:
                reply = self._post(body, self.seen, count, absorb=False, anew=anew)
                break
            except SeenMismatch as mismatch:
                with suppress(SeenMismatch):  # it is elsewhere again: the next attempt tells where
                    anew = self._catch_up(mismatch.seen)
        else:
            raise ServiceError(f"stream {self.stream}: the service loses its position again and again")
        answers = Answers(self.seen, count, reply)
        self._kept.append(flows)
        self.seen += count
        self._trim(reply.durable)
        return answers

    def _post(self, body: bytes, seen: int, count: int, *, absorb: bool, anew: bool) -> Reply:
        reply = self._client.post_verdicts(
            body, media_type=self._media_type, stream=self.stream, seen=seen, absorb=absorb, anew=anew
        )
        if reply.seen != seen + count:
            raise ServiceError(f"stream {self.stream}: the service counts {reply.seen} flows, not {seen + count}")
        return reply

    def _catch_up(self, position: int) -> bool:
        """Send what the service has lost again; whether the next request has to begin the stream anew."""
        anew = False
        if not self._start <= position <= self.seen:
            if not self._anew:
                where = (
                    f"more than the {self.seen} of this client: another client sends to it, or an earlier one did"
                    if position > self.seen
                    else f"and those before {self._start} are no longer kept here"
                )
                raise ServiceError(
                    f"stream {self.stream}: the service has seen {position} flows, {where}; delete the stream, take "
                    "another name, or allow that it begins anew"
                )
            position, anew = self._start, True
        while position < self.seen:
            part = self._between(position, min(position + self._resend, self.seen))
            count = sum(len(flows) for flows in part)
            body = encode(part[0] if len(part) == 1 else _joined(part), self._media_type)
            self._post(body, position, count, absorb=True, anew=anew)
            anew = False
            position += count
            self.resent += count
        return anew

    def _between(self, begin: int, end: int) -> list[Flows]:
        """The kept flows at these positions."""
        parts: list[Flows] = []
        position = self._start
        for flows in self._kept:
            low, high = max(begin - position, 0), min(end - position, len(flows))
            if low < high:
                parts.append(flows.iloc[low:high] if isinstance(flows, pd.DataFrame) else flows[low:high])
            position += len(flows)
        return parts

    def _trim(self, durable: int) -> None:
        while self._kept:
            end = self._start + len(self._kept[0])
            if end > durable and self.seen - end < self._keep:
                break
            self._start = end
            self._kept.popleft()


def encode(flows: Flows, media_type: str) -> bytes:
    """Flows as the body of a request.

    Args:
        flows: canonical reports, or (JSON and NDJSON only) flows as the interface has them.
        media_type: `JSON`, `NDJSON` or `ARROW`.
    """
    if media_type == ARROW:
        if not isinstance(flows, pd.DataFrame):
            raise TypeError("only a table is sent as Arrow")
        return _encode_arrow(flows)
    rows = as_rows(flows) if isinstance(flows, pd.DataFrame) else flows
    if media_type == NDJSON:
        return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    if media_type == JSON:
        return orjson.dumps({"flows": rows})
    raise ValueError(f"flows are not sent as {media_type}")


def as_rows(reports: pd.DataFrame) -> list[dict[str, Any]]:
    """Canonical reports as flows of the interface; who sends them one by one makes them once (1.2 us each)."""
    names = [name for name in WIRE_COLUMNS if name in reports]
    columns = [_values(reports[name]) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    """A column as plain values; None where missing, times as integer ms, or as text where they are finer."""
    values: np.ndarray
    if isinstance(column.dtype, pd.CategoricalDtype):
        values = np.array([*column.cat.categories, None], object)[column.cat.codes.to_numpy()]
    elif isinstance(column.dtype, pd.DatetimeTZDtype):
        times = column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy("datetime64[us]")
        values = times.astype(np.int64)
        if (values % 1000 == 0).all():
            values //= 1000
        else:
            values = np.char.add(np.datetime_as_string(times, unit="us"), "Z")
    elif isinstance(column.dtype, np.dtype) and column.dtype != object:
        values = column.to_numpy()
    else:
        values = column.to_numpy(dtype=object, na_value=None)
    plain: list[Any] = values.tolist()
    return plain


def _encode_arrow(reports: pd.DataFrame) -> bytes:
    import pyarrow as pa

    arrays = {}
    for name in (name for name in WIRE_COLUMNS if name in reports):
        column = reports[name]
        if isinstance(column.dtype, pd.CategoricalDtype) and len(column.cat.categories) > len(column):
            arrays[name] = pa.array(_values(column), pa.string())  # a few rows out of many names
        else:
            array = pa.array(column)
            arrays[name] = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    table = pa.table(arrays)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _joined(parts: list[Flows]) -> Flows:
    if all(isinstance(part, pd.DataFrame) for part in parts):
        return pd.concat(cast(list[pd.DataFrame], parts), ignore_index=True)
    rows: list[Mapping[str, Any]] = []
    for part in parts:
        rows.extend(as_rows(part) if isinstance(part, pd.DataFrame) else part)
    return rows


def _rows(reply: Reply) -> list[dict[str, Any]]:
    try:
        if reply.media_type == ARROW:
            import pyarrow as pa

            with pa.ipc.open_stream(reply.body) as stream:
                rows = stream.read_all().to_pylist()
            return [
                {"index": row["index"], "rejected": row["rejected"]}
                if row.get("rejected") is not None
                else {name: value for name, value in row.items() if name != "rejected"}
                for row in rows
            ]
        if reply.media_type == NDJSON:
            return [orjson.loads(line) for line in reply.body.splitlines() if line]
        answer = orjson.loads(reply.body)
        rejected = [{"index": row["index"], "rejected": row["reason"]} for row in answer["rejected"]]
        return sorted([*answer["verdicts"], *rejected], key=lambda row: int(row["index"]))
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise ServiceError("the service's answer cannot be read: is it another version?") from error


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> dict[str, Any]:
        if self.headers.get_content_subtype() != "json":
            return {}
        with suppress(ValueError):
            answer = orjson.loads(self.body)
            if isinstance(answer, dict):
                return answer
        return {}


def _problem(answer: _Answer) -> dict[str, Any]:
    if answer.headers.get_content_type() != "application/problem+json":
        return {}
    with suppress(ValueError):
        problem = orjson.loads(answer.body)
        if isinstance(problem, dict):
            return problem
    return {}


def _count(value: object) -> int:
    try:
        return int(cast(str, value))
    except (TypeError, ValueError):
        raise ServiceError(
            "the service's answer does not say where the stream is: is it a FlowSentry service?"
        ) from None


def _text(flag: bool) -> str:
    return "true" if flag else "false"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
