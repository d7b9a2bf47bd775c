"""From the bytes of a request to arrays, and from verdicts to the bytes of an answer: JSON, NDJSON and Arrow.

What is read is what the offline path reads from a file with the same flows, and a flow is rejected for the rules of
`flows.expectations`. Nothing goes through pandas: a column is converted in one go if all its values are ordinary, and
value by value only if one is not. Reasons are fixed words; they never contain any part of the input.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa

from flowsentry.errors import ServiceError
from flowsentry.flows.columns import Columns, has_payload, transport_number
from flowsentry.flows.hashing import compiled, hash_bytes
from flowsentry.flows.schema import (
    BENIGN,
    MALICIOUS,
    MAX_COUNT,
    MAX_DURATION_NS,
    MAX_PORT,
    TRANSPORTS,
    conform,
    is_address,
)
from flowsentry.serving import _arrow

if TYPE_CHECKING:
    from flowsentry.detector import Judged
    from flowsentry.reasons import Reason

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
ARROW: Final = "application/vnd.apache.arrow.stream"
MEDIA_TYPES: Final = (JSON, NDJSON, ARROW)

MAX_FLOW_ID: Final = 256
"""Characters of the longest flow id."""
AHEAD_MS: Final = 600_000
"""How far a report's time may be ahead of the service's clock: a stream's clock never runs backwards."""

COLUMNS: Final = (
    *("flow_id", "final", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "time", "duration"),
    "packets",
)
"""What a flow has, in the order of the canonical schema."""

_MISSING: Final = -(2**63)
"""Stands for a missing port or count."""
_RULES: Final = {
    1: f"src_port is not within 0..{MAX_PORT}",
    2: f"dst_port is not within 0..{MAX_PORT}",
    4: f"bytes is not within 0..{MAX_COUNT}",
    8: f"duration is not within 0..{MAX_DURATION_NS}",
    16: f"packets is not within 0..{MAX_COUNT}",
    32: "a port is missing although transport is tcp or udp",
    64: "time is ahead of the service's clock",
}
_NOT_AN_OBJECT: Final = "not a JSON object"
REASONS: Final = (
    _NOT_AN_OBJECT,
    *(f"{name} is missing" for name in ("flow_id", "src_ip", "dst_ip", "bytes", "time", "duration")),
    *(f"{name} is not a whole number" for name in ("src_port", "dst_port", "bytes", "duration", "packets")),
    *(f"{name} is not an IPv4 or IPv6 address" for name in ("src_ip", "dst_ip")),
    "flow_id is not text",
    f"flow_id is longer than {MAX_FLOW_ID} characters",
    "final is not true or false",
    "transport is not known",
    "time is not a timestamp",
    *_RULES.values(),
)
"""Every reason that a flow can be rejected for."""


class Malformed(ServiceError):
    """A body that is not a request; `code` is that of the problem, `detail` is in fixed words."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Batch:
    """The flows of one request."""

    columns: Columns
    """The good flows, in their order."""
    index: np.ndarray
    """int64 [good]: place in the request, from 0."""
    flow_ids: list[str]
    """[good]."""
    rejected: list[tuple[int, str]]
    """Place in the request and reason of every bad flow, in order of place."""
    count: int
    """Flows in the request, good and bad."""


@dataclass(frozen=True)
class Head:
    """What an answer says besides its verdicts."""

    stream: str
    seen: int
    durable: int
    model_version: str
    view: str
    view_version: str
    threshold: float


def parse(body: bytes | memoryview, media_type: str, *, max_flows: int, now_ms: int) -> Batch:
    """Read the flows of a request.

    Args:
        body: as it came, not compressed.
        media_type: one of `MEDIA_TYPES`, without parameters.
        max_flows: most flows in a request.
        now_ms: the service's clock, ms since 1970.

    Raises:
        Malformed: the body as a whole cannot be read; codes invalid, too_large and unsupported_media_type.
    """
    if media_type == JSON:
        return _of_objects(_json_flows(body, max_flows), now_ms)
    if media_type == NDJSON:
        return _of_objects(_ndjson_flows(body, max_flows), now_ms)
    if media_type == ARROW:
        return _of_arrow(body, max_flows, now_ms)
    raise Malformed("unsupported_media_type", f"the body must be one of {', '.join(MEDIA_TYPES)}")


def _too_many(max_flows: int) -> Malformed:
    return Malformed("too_large", f"there are more than {max_flows} flows in the request")


def _json_flows(body: bytes | memoryview, max_flows: int) -> list[Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("invalid", "the body is not valid JSON in UTF-8") from None
    flows = content.get("flows") if isinstance(content, dict) else None
    if not isinstance(flows, list):
        raise Malformed("invalid", 'the body is not an object with a list "flows"')
    if len(flows) > max_flows:
        raise _too_many(max_flows)
    return flows


def _ndjson_flows(body: bytes | memoryview, max_flows: int) -> list[Any]:
    """One value for every line that is not blank, None for one that is no JSON."""
    content = bytes(body)
    # As many blank lines are let pass, because splitting costs memory for each.
    if content.count(b"\n") > 2 * max_flows:
        raise _too_many(max_flows)
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        flows = list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        flows = [_loaded(line) for line in lines if not line.isspace() and line]
    if not flows:
        raise Malformed("invalid", "the body is empty")
    if len(flows) > max_flows:
        raise _too_many(max_flows)
    return flows


def _loaded(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


class _Rejects:
    """Why flows are rejected: a flow for the first value that cannot be read, else for a rule that it breaks."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, str]] = {}

    def unreadable(self, place: int, column: str, reason: str) -> None:
        self._add(place, (COLUMNS.index(column), reason))

    def broken(self, place: int, reason: str) -> None:
        self._add(place, (len(COLUMNS), reason))

    def not_an_object(self, place: int) -> None:
        self._add(place, (-1, _NOT_AN_OBJECT))

    def _add(self, place: int, found: tuple[int, str]) -> None:
        self._found[place] = min(found, self._found.get(place, found))

    def __bool__(self) -> bool:
        return bool(self._found)

    def listed(self) -> list[tuple[int, str]]:
        return [(place, reason) for place, (_, reason) in sorted(self._found.items())]


@dataclass
class _Fields:
    """All flows of a request, good and bad, as arrays; a bad value is replaced by a harmless one."""

    flow_ids: list[str]
    flow_hashes: np.ndarray
    final: np.ndarray
    src_ip: np.ndarray
    """uint64."""
    dst_ip: np.ndarray
    ipv6: np.ndarray
    """bool: the source is an IPv6."""
    src_port: np.ndarray
    """int64, `_MISSING` where missing."""
    dst_port: np.ndarray
    transport: np.ndarray
    bytes: np.ndarray
    time: np.ndarray
    """int64, us since 1970."""
    duration: np.ndarray
    packets: np.ndarray | None
    """int64, `_MISSING` where missing; None if no flow has them."""
    texts: Callable[[], dict[str, Sequence[Any]]]
    """src_ip, dst_ip and transport as given."""


def _of_objects(flows: list[Any], now_ms: int) -> Batch:
    rejects = _Rejects()
    if set(map(type, flows)) - {dict}:
        for place, flow in enumerate(flows):
            if type(flow) is not dict:
                rejects.not_an_object(place)
                flows[place] = {}
    return _batch(_fields(_columns(flows), len(flows), rejects), rejects, now_ms)


_ALL: Final = itemgetter(*COLUMNS)
_WITHOUT_PACKETS: Final = itemgetter(*COLUMNS[:-1])


def _columns(flows: list[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """The values of every column; one that no flow has may be left out."""
    for names, get in ((COLUMNS, _ALL), (COLUMNS[:-1], _WITHOUT_PACKETS)):
        if not flows or names[-1] not in flows[0]:
            continue
        try:
            return dict(zip(names, zip(*map(get, flows), strict=True), strict=True))
        except KeyError:
            pass
    return {name: [flow.get(name) for flow in flows] for name in COLUMNS}


def _fields(values: Mapping[str, Sequence[Any]], count: int, rejects: _Rejects) -> _Fields:
    ids = _flow_ids(values["flow_id"], rejects)
    source, destination, book = _addresses(values["src_ip"], values["dst_ip"], rejects)
    packets = values.get("packets")
    return _Fields(
        ids,
        hash_bytes(*_encoded(ids)),
        _flags(values["final"], rejects),
        book.hashes[source],
        book.hashes[destination],
        book.ipv6[source],
        _whole("src_port", values["src_port"], rejects, optional=True),
        _whole("dst_port", values["dst_port"], rejects, optional=True),
        _transports(values["transport"], rejects),
        _whole("bytes", values["bytes"], rejects),
        _times(values["time"], rejects),
        _whole("duration", values["duration"], rejects),
        None if packets is None else _whole("packets", packets, rejects, optional=True),
        lambda: {name: values[name] for name in ("src_ip", "dst_ip", "transport")},
    )


def _flow_ids(values: Sequence[Any], rejects: _Rejects) -> list[str]:
    if set(map(type, values)) == {str} and all(values) and max(map(len, values)) <= MAX_FLOW_ID:
        return list(values)
    ids = []
    for place, value in enumerate(values):
        if value is None or value == "":
            rejects.unreadable(place, "flow_id", "flow_id is missing")
        elif type(value) is not str:
            rejects.unreadable(place, "flow_id", "flow_id is not text")
        elif len(value) > MAX_FLOW_ID:
            rejects.broken(place, f"flow_id is longer than {MAX_FLOW_ID} characters")
        else:
            ids.append(value)
            continue
        ids.append("")
    return ids


def _encoded(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (int64 [texts + 1]) and UTF-8 (uint8) of the texts one after the other."""
    joined = "".join(texts)
    pieces: Sequence[str] | list[bytes] = texts if joined.isascii() else [text.encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, pieces), np.int64, len(texts)), out=offsets[1:])
    return offsets, np.frombuffer(joined.encode(), np.uint8)


def _flags(values: Sequence[Any], rejects: _Rejects) -> np.ndarray:
    if set(map(type, values)) <= {bool, type(None)}:
        return np.array(values, bool)
    flags = np.zeros(len(values), bool)
    for place, value in enumerate(values):
        if type(value) is bool:
            flags[place] = value
        elif value is not None and value != "":
            rejects.unreadable(place, "final", "final is not true or false")
    return flags


class _Book:
    """Addresses seen lately. Only grows, so that readers need no lock; a full one is replaced."""

    CAPACITY: Final = 1 << 16

    def __init__(self, capacity: int) -> None:
        self.places: dict[str, int] = {}
        """Row of an address in the arrays; row 0 stands for what is none."""
        self.hashes = np.ones(1 + capacity, np.uint64)
        self.ipv6 = np.zeros(1 + capacity, bool)

    def room(self) -> int:
        return len(self.hashes) - 1 - len(self.places)

    def add(self, addresses: list[str]) -> None:
        begin = 1 + len(self.places)
        self.hashes[begin : begin + len(addresses)] = hash_bytes(*_encoded(addresses))
        self.ipv6[begin : begin + len(addresses)] = [":" in address for address in addresses]
        for place, address in enumerate(addresses, begin):
            self.places[address] = place


_book = _Book(_Book.CAPACITY)
_book_lock = threading.Lock()


def _learn(texts: Iterable[Any]) -> _Book:
    """A book that has all addresses among the texts."""
    global _book  # noqa: PLW0603
    valid = [text for text in {text for text in texts if type(text) is str} if text in _book.places or is_address(text)]
    with _book_lock:
        new = [text for text in valid if text not in _book.places]
        if len(new) > _book.room():
            book, new = _Book(max(_Book.CAPACITY, len(valid))), valid
        else:
            book = _book
        book.add(new)
        _book = book
        return book


def _addresses(
    sources: Sequence[Any], destinations: Sequence[Any], rejects: _Rejects
) -> tuple[np.ndarray, np.ndarray, _Book]:
    """Rows of both ends in the book of addresses."""
    count, book = len(sources), _book
    ends = (*sources, *destinations)
    try:
        places = np.fromiter(map(book.places.__getitem__, ends), np.int64, 2 * count)
    except (KeyError, TypeError):
        book = _learn(ends)
        places = np.array([book.places.get(end, 0) if type(end) is str else 0 for end in ends], np.int64)
        for place in np.flatnonzero(places == 0).tolist():
            end, name = ends[place], "src_ip" if place < count else "dst_ip"
            missing = end is None or end == ""
            reason = f"{name} is missing" if missing else f"{name} is not an IPv4 or IPv6 address"
            rejects.broken(place % count, reason)
    return places[:count], places[count:], book


_TRANSPORTS: Final[dict[str | None, int]] = {
    **{name: transport_number(name) for name in TRANSPORTS},
    **{name.upper(): transport_number(name) for name in TRANSPORTS},
    **{missing: transport_number(None) for missing in (None, "")},
}


def _transports(values: Sequence[Any], rejects: _Rejects) -> np.ndarray:
    try:
        return np.fromiter(map(_TRANSPORTS.__getitem__, values), np.int64, len(values))
    except (KeyError, TypeError):
        numbers = np.zeros(len(values), np.int64)
        for place, value in enumerate(values):
            number = _TRANSPORTS.get(value.lower()) if type(value) is str else None
            if number is not None:
                numbers[place] = number
            elif value is not None:
                rejects.broken(place, "transport is not known")
        return numbers


def _whole(name: str, values: Sequence[Any], rejects: _Rejects, *, optional: bool = False) -> np.ndarray:
    """Whole numbers of 64 bits; 5.0 is one, true and "5" are none."""
    kinds = set(map(type, values))
    try:
        if kinds == {int}:
            return np.fromiter(values, np.int64, len(values))
        if optional and kinds <= {int, type(None)}:
            return np.array([_MISSING if value is None else value for value in values], np.int64)
    except OverflowError:
        pass
    numbers = np.full(len(values), _MISSING if optional else 0, np.int64)
    for place, value in enumerate(values):
        if value is None or value == "":
            if not optional:
                rejects.unreadable(place, name, f"{name} is missing")
        elif (type(value) is int or (type(value) is float and value.is_integer())) and -(2**63) <= value < 2**63:
            numbers[place] = int(value)
        else:
            rejects.unreadable(place, name, f"{name} is not a whole number")
    return numbers


_NO_TIME: Final = -1
_LAST_MS: Final = 9_214_646_400_000
"""Beginning of the year 2262: nanoseconds since 1970 fit into 64 bits until then."""
_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d)(?::?(\d\d))?)?", re.ASCII
)


def _times(values: Sequence[Any], rejects: _Rejects) -> np.ndarray:
    """Microseconds since 1970, what is finer is cut off."""
    kinds = set(map(type, values))
    if kinds == {str}:
        times = np.empty(len(values), np.int64)
        if _instants(*_encoded(values), times) == 0:
            return times
    elif kinds == {int} and min(values) >= 0 and max(values) < _LAST_MS:
        return np.fromiter(values, np.int64, len(values)) * 1000
    times = np.zeros(len(values), np.int64)
    for place, value in enumerate(values):
        if value is None or value == "":
            rejects.unreadable(place, "time", "time is missing")
            continue
        time = _NO_TIME
        if type(value) is str:
            time = _instant(value)
        elif type(value) is int:
            time = value * 1000
        if 0 <= time < _LAST_MS * 1000:
            times[place] = time
        else:
            rejects.unreadable(place, "time", "time is not a timestamp")
    return times


def _instant(text: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time; without a zone it is UTC. `_NO_TIME` if it is none."""
    found = _TIME.fullmatch(text)
    if found is None:
        return _NO_TIME
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    fraction, sign, off_hours, off_minutes = found.groups()[6:]
    try:
        days = date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        return _NO_TIME
    ends_day = hour == 24 and minute == second == 0 and not int(fraction or 0)
    if (hour > 23 and not ends_day) or minute > 59 or second > 59:
        return _NO_TIME
    offset = (int(off_hours or 0) * 60 + int(off_minutes or 0)) * (-60 if sign == "-" else 60)
    seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset
    return seconds * 1_000_000 + int((fraction or "")[:6].ljust(6, "0"))


_PARTS: Final = np.array([0, 0, 0, 0, -1, 1, 1, -1, 2, 2, -1, 3, 3, -1, 4, 4, -1, 5, 5])
"""Which number every character of `YYYY-MM-DDTHH:MM:SS` belongs to; -1: to none."""
_SEPARATORS: Final = np.frombuffer(b"0000-00-00T00:00:00", np.uint8)


@compiled
def _instants(offsets: np.ndarray, data: np.ndarray, times: np.ndarray) -> int:
    """Times in the common form, `YYYY-MM-DDTHH:MM:SS` with or without a fraction and `Z`, into us since 1970.

    Returns how many are of another form, or none.
    """
    others = 0
    number = np.zeros(7, np.int64)
    for i in range(len(times)):
        begin, end = offsets[i], offsets[i + 1]
        number[:] = 0
        good = end - begin >= 20 and data[end - 1] == 90
        if good:
            for j in range(19):
                digit = np.int64(data[begin + j]) - 48
                part = _PARTS[j]
                if part < 0:
                    good = good and data[begin + j] == _SEPARATORS[j]
                else:
                    good = good and 0 <= digit <= 9
                    number[part] = number[part] * 10 + digit
        if good and end - begin > 20:
            good = data[begin + 19] == 46 and end - begin > 21
            scale = 100_000
            for j in range(begin + 20, end - 1):
                digit = np.int64(data[j]) - 48
                good = good and 0 <= digit <= 9
                number[6] += digit * scale
                scale //= 10
        year, month, day = number[0], number[1], number[2]
        good = good and 1970 <= year < 2262 and 1 <= month <= 12
        good = good and number[3] < 24 and number[4] < 60 and number[5] < 60
        if good:
            leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
            length = 31
            if month in (4, 6, 9, 11):
                length = 30
            elif month == 2:
                length = 29 if leap else 28
            good = 1 <= day <= length
        if good:
            # Days since 1970 with years that begin in March (Richards 2013).
            shifted = year - (1 if month <= 2 else 0)
            days = 365 * shifted + shifted // 4 - shifted // 100 + shifted // 400
            days += (153 * ((month + 9) % 12) + 2) // 5 + day - 719_469
            seconds = ((days * 24 + number[3]) * 60 + number[4]) * 60 + number[5]
            times[i] = seconds * 1_000_000 + number[6]
        else:
            others += 1
    return others


@compiled
def _broken_rules(
    src_port: np.ndarray,
    dst_port: np.ndarray,
    transport: np.ndarray,
    sizes: np.ndarray,
    time: np.ndarray,
    duration: np.ndarray,
    packets: np.ndarray,
    latest: int,
    broken: np.ndarray,
) -> int:
    """Which of `_RULES` every flow breaks, as bits in `broken` int64 [flows]; returns how many break one."""
    count = 0
    for i in range(len(broken)):
        rules = 0
        for port, rule in ((src_port[i], 1), (dst_port[i], 2)):
            if port == _MISSING:
                if transport[i] in (6, 17):
                    rules |= 32
            elif port < 0 or port > MAX_PORT:
                rules |= rule
        if sizes[i] < 0 or sizes[i] > MAX_COUNT:
            rules |= 4
        if duration[i] < 0 or duration[i] > MAX_DURATION_NS:
            rules |= 8
        if len(packets) > 0 and packets[i] != _MISSING and (packets[i] < 0 or packets[i] > MAX_COUNT):
            rules |= 16
        if time[i] // 1000 > latest:
            rules |= 64
        broken[i] = rules
        if rules:
            count += 1
    return count


_NO_PACKETS: Final = np.empty(0, np.int64)


def _batch(fields: _Fields, rejects: _Rejects, now_ms: int) -> Batch:
    count = len(fields.flow_ids)
    broken = np.empty(count, np.int64)
    rules = _broken_rules(
        fields.src_port,
        fields.dst_port,
        fields.transport,
        fields.bytes,
        fields.time,
        fields.duration,
        _NO_PACKETS if fields.packets is None else fields.packets,
        now_ms + AHEAD_MS,
        broken,
    )
    if rules:
        for place in np.flatnonzero(broken).tolist():
            for rule, reason in _RULES.items():
                if broken[place] & rule:
                    rejects.broken(place, reason)
        for name, ports in (("src_port", fields.src_port), ("dst_port", fields.dst_port)):
            # The canonical type of a port has 32 bits.
            for place in np.flatnonzero((np.abs(ports + 0.5) > 2**31) & (ports != _MISSING)).tolist():
                rejects.unreadable(place, name, f"{name} is not a whole number")
    rejected = rejects.listed() if rejects else []
    keep, ids = np.arange(count), fields.flow_ids
    if rejected:
        keep = np.delete(keep, [place for place, _ in rejected])
        ids = [ids[place] for place in keep.tolist()]
    return Batch(_good(fields, keep), keep, ids, rejected, count)


def _good(fields: _Fields, keep: np.ndarray) -> Columns:
    every = len(keep) == len(fields.flow_ids)

    def kept(values: np.ndarray) -> np.ndarray:
        return values if every else values[keep]

    packets = None if fields.packets is None else kept(fields.packets)
    transport, sizes, time = kept(fields.transport), kept(fields.bytes), kept(fields.time)
    return Columns(
        time=time // 1000,
        flow_id=kept(fields.flow_hashes),
        src_ip=kept(fields.src_ip),
        dst_ip=kept(fields.dst_ip),
        final=kept(fields.final),
        src_port=_or_zero(kept(fields.src_port)),
        dst_port=_or_zero(kept(fields.dst_port)),
        transport=transport,
        bytes=sizes,
        duration=kept(fields.duration),
        payload=has_payload(transport, sizes, packets, kept(fields.ipv6)),
        table=lambda: _table(fields, keep),
    )


def _or_zero(ports: np.ndarray) -> np.ndarray:
    return np.maximum(ports, 0)


def _table(fields: _Fields, keep: np.ndarray) -> pd.DataFrame:
    """The canonical table of the good flows."""
    texts = {name: [values[i] for i in keep.tolist()] for name, values in fields.texts().items()}

    def gaps(numbers: np.ndarray) -> pd.Series:
        return pd.Series(numbers[keep], dtype="Int64").mask(numbers[keep] == _MISSING)

    columns: dict[str, Any] = {
        "recording": "stream",
        "file": "request",
        "row": keep + 1,
        "flow_id": [fields.flow_ids[i] for i in keep.tolist()],
        "final": fields.final[keep],
        "src_ip": texts["src_ip"],
        "dst_ip": texts["dst_ip"],
        "src_port": gaps(fields.src_port),
        "dst_port": gaps(fields.dst_port),
        "transport": pd.Series([text.lower() if text else None for text in texts["transport"]], dtype=object),
        "bytes": fields.bytes[keep],
        "time": pd.to_datetime(fields.time[keep], unit="us", utc=True),
        "duration": fields.duration[keep],
        "label": pd.Series([None] * len(keep), dtype=object),
    }
    if fields.packets is not None and (fields.packets[keep] != _MISSING).any():
        columns["packets"] = gaps(fields.packets)
    return conform(pd.DataFrame(columns))


def _of_arrow(body: bytes | memoryview, max_flows: int, now_ms: int) -> Batch:
    try:
        table = _arrow.read(body, COLUMNS, max_flows)
    except _arrow.NotArrow as error:
        raise Malformed("invalid", str(error)) from None
    except _arrow.TooManyRows:
        raise _too_many(max_flows) from None
    count = table.num_rows
    arrays = {name: _one_chunk(table.column(name)) for name in table.column_names}
    nothing = pa.nulls(count)
    rejects = _Rejects()
    given: dict[str, pa.Array] = {name: arrays.get(name, nothing) for name in COLUMNS}
    ids, hashes = _arrow_flow_ids(given["flow_id"], rejects)
    source, destination, book = _arrow_addresses(given["src_ip"], given["dst_ip"], rejects)
    fields = _Fields(
        ids,
        hashes,
        _arrow_flags(given["final"], rejects),
        book.hashes[source],
        book.hashes[destination],
        book.ipv6[source],
        _arrow_whole("src_port", given["src_port"], rejects, optional=True),
        _arrow_whole("dst_port", given["dst_port"], rejects, optional=True),
        _arrow_transports(given["transport"], rejects),
        _arrow_whole("bytes", given["bytes"], rejects),
        _arrow_times(given["time"], rejects),
        _arrow_whole("duration", given["duration"], rejects),
        _arrow_whole("packets", given["packets"], rejects, optional=True) if "packets" in arrays else None,
        lambda: {name: _values(given[name]) for name in ("src_ip", "dst_ip", "transport")},
    )
    return _batch(fields, rejects, now_ms)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _values(array: pa.Array) -> list[Any]:
    """As Python objects; a text that is there often is one object, however long a dictionary makes it."""
    if pa.types.is_dictionary(array.type):
        texts = array.dictionary.to_pylist()
        return [None if place is None else texts[place] for place in array.indices.to_pylist()]
    if pa.types.is_timestamp(array.type):
        # As text it is no time, and as Python's own it could be out of range.
        return [None if value is None else math.inf for value in array.cast(pa.int64()).to_pylist()]
    if pa.types.is_floating(array.type):
        return [None if value is None or math.isnan(value) else value for value in array.to_pylist()]
    values: list[Any] = array.to_pylist()
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _arrow_flow_ids(array: pa.Array, rejects: _Rejects) -> tuple[list[str], np.ndarray]:
    if _is_text(array.type) and not array.null_count and len(array):
        _, starts, content = array.buffers()
        width: Any = np.int64 if pa.types.is_large_string(array.type) else np.int32
        offsets = np.frombuffer(starts, width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
        lengths = np.diff(offsets)
        if lengths.min() > 0 and lengths.max() <= MAX_FLOW_ID:
            return array.to_pylist(), hash_bytes(offsets, np.frombuffer(content, np.uint8))
    ids = _flow_ids(_values(array), rejects)
    return ids, hash_bytes(*_encoded(ids))


def _arrow_addresses(
    source: pa.Array, destination: pa.Array, rejects: _Rejects
) -> tuple[np.ndarray, np.ndarray, _Book]:
    """As `_addresses`, which looks up every distinct address once here."""
    if all(_is_text(end.type) and not end.null_count and len(end) for end in (source, destination)):
        coded = [end.dictionary_encode() for end in (source, destination)]
        texts = [end.dictionary.to_pylist() for end in coded]
        passed = _Rejects()
        known = _addresses([*texts[0], *texts[1]], [*texts[0], *texts[1]], passed)
        if not passed:
            places, _, book = known
            first, second = (end.indices.to_numpy() for end in coded)
            return places[first], places[len(texts[0]) :][second], book
    return _addresses(_values(source), _values(destination), rejects)


def _arrow_transports(array: pa.Array, rejects: _Rejects) -> np.ndarray:
    if _is_text(array.type) and not array.null_count:
        coded, passed = array.dictionary_encode(), _Rejects()
        numbers = _transports(coded.dictionary.to_pylist(), passed)
        if not passed:
            return numbers[coded.indices.to_numpy()]
    return _transports(_values(array), rejects)


def _arrow_flags(array: pa.Array, rejects: _Rejects) -> np.ndarray:
    if pa.types.is_boolean(array.type):
        return np.asarray(array.fill_null(False).to_numpy(zero_copy_only=False), bool)
    return _flags(_values(array), rejects)


def _arrow_whole(name: str, array: pa.Array, rejects: _Rejects, *, optional: bool = False) -> np.ndarray:
    if pa.types.is_integer(array.type) and not array.null_count:
        numbers = array.to_numpy()
        if array.type != pa.uint64() or (numbers < 2**63).all():
            return np.array(numbers, np.int64)
    return _whole(name, _values(array), rejects, optional=optional)


_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _arrow_times(array: pa.Array, rejects: _Rejects) -> np.ndarray:
    if not pa.types.is_timestamp(array.type):
        return _times(_values(array), rejects)
    per_second = _PER_SECOND[array.type.unit]
    if array.null_count:
        for place in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
            rejects.unreadable(place, "time", "time is missing")
        array = array.view(pa.int64()).fill_null(0)
    ticks = array.view(pa.int64()).to_numpy()
    outside = (ticks < 0) | (ticks >= _LAST_MS // 1000 * per_second)
    if outside.any():
        for place in np.flatnonzero(outside).tolist():
            rejects.unreadable(place, "time", "time is not a timestamp")
        ticks = np.where(outside, 0, ticks)
    return ticks * (10**6 // per_second) if per_second <= 10**6 else ticks // 1000


def answer(media_type: str, head: Head, judged: Judged | None, batch: Batch) -> bytes:
    """The body of an answer.

    Args:
        media_type: one of `MEDIA_TYPES`.
        head: of the stream after this request.
        judged: the good flows' verdicts; None for flows that were only absorbed: only rejects are listed then.
        batch: the request.
    """
    if media_type == ARROW:
        return _arrow_answer(head, judged, batch)
    verdicts = [] if judged is None else _verdicts(head, judged, batch)
    rejects = [{"index": place, "reason": reason} for place, reason in batch.rejected]
    if media_type == NDJSON:
        lines = [*verdicts, *({"index": reject["index"], "rejected": reject["reason"]} for reject in rejects)]
        if rejects:
            lines.sort(key=itemgetter("index"))
        return b"".join([orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines])
    return orjson.dumps(
        {
            "stream": head.stream,
            "seen": head.seen,
            "durable": head.durable,
            "model_version": head.model_version,
            "view": head.view,
            "view_version": head.view_version,
            "threshold": head.threshold,
            "verdicts": verdicts,
            "rejected": rejects,
        }
    )


@dataclass(frozen=True)
class _Alarms:
    """What only malicious flows have, by their place among the good ones."""

    places: np.ndarray
    reasons: list[list[dict[str, Any]]]
    kinds: Sequence[str]
    windows: Sequence[str]


def _alarms(judged: Judged) -> _Alarms:
    places = np.flatnonzero(judged.malicious)
    if not len(places):
        return _Alarms(places, [], [], [])
    features = {feature.name: feature for feature in judged.detector.manifest.features}
    found = judged.reasons(places)
    leading = [features[reasons[0]["feature"]] for reasons in found]
    return _Alarms(
        places,
        [[_reason(reason) for reason in reasons] for reasons in found],
        [feature.anomaly for feature in leading],
        [feature.window for feature in leading],
    )


def _reason(reason: Reason) -> dict[str, Any]:
    return {
        "feature": reason["feature"],
        "value": reason["value"],
        "unit": reason["unit"],
        "share": reason["weight"],
        "text": reason["text"],
    }


def _verdicts(head: Head, judged: Judged, batch: Batch) -> list[dict[str, Any]]:
    threshold, model_version, view_version = head.threshold, head.model_version, head.view_version
    none: list[Any] = []
    verdicts = [
        {
            "index": place,
            "flow_id": flow_id,
            "label": BENIGN,
            "anomaly_score": score,
            "threshold": threshold,
            "anomaly_type": None,
            "baseline_window": None,
            "warm": warm,
            "first_alarm": None,
            "model_version": model_version,
            "view_version": view_version,
            "reasons": none,
        }
        for place, flow_id, score, warm in zip(
            batch.index.tolist(), batch.flow_ids, judged.score.tolist(), judged.warm.tolist(), strict=True
        )
    ]
    alarms = _alarms(judged)
    if len(alarms.places):
        times = _rfc3339(judged.first_alarm[alarms.places])
        rows = zip(alarms.places.tolist(), alarms.kinds, alarms.windows, times, alarms.reasons, strict=True)
        for place, kind, window, time, reasons in rows:
            verdicts[place].update(
                label=MALICIOUS, anomaly_type=kind, baseline_window=window, first_alarm=time, reasons=reasons
            )
    return verdicts


def _rfc3339(milliseconds: np.ndarray) -> list[str | None]:
    """Texts of the times, None for 0; many flows of a flood have the same."""
    distinct, places = np.unique(milliseconds, return_inverse=True)
    stamps = np.datetime_as_string(distinct.astype("datetime64[ms]"), unit="ms").tolist()
    texts = [f"{stamp}Z" if moment else None for moment, stamp in zip(distinct.tolist(), stamps, strict=True)]
    return [texts[place] for place in places.tolist()]


_REASON: Final = pa.struct(
    [
        ("feature", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("share", pa.float64()),
        ("text", pa.string()),
    ]
)
ANSWER: Final = pa.schema(
    [
        ("index", pa.int64()),
        ("flow_id", pa.string()),
        ("label", pa.string()),
        ("anomaly_score", pa.float64()),
        ("threshold", pa.float64()),
        ("anomaly_type", pa.string()),
        ("baseline_window", pa.string()),
        ("warm", pa.bool_()),
        ("first_alarm", pa.timestamp("ms", "UTC")),
        ("model_version", pa.string()),
        ("view_version", pa.string()),
        ("reasons", pa.list_(_REASON)),
        ("rejected", pa.string()),
    ]
)
"""Columns of an Arrow answer: one row per flow, in their order; of a rejected one only `index` and `rejected`."""
_LABELS: Final = pa.array([BENIGN, MALICIOUS])


def _arrow_answer(head: Head, judged: Judged | None, batch: Batch) -> bytes:
    if judged is None:
        index, columns = np.empty(0, np.int64), [pa.nulls(0, field.type) for field in list(ANSWER)[1:-1]]
    else:
        index, columns = batch.index, _verdict_columns(head, judged, batch)
    reasons = pa.nulls(len(index), pa.string())
    if batch.rejected:
        bad = np.array([place for place, _ in batch.rejected], np.int64)
        order = np.argsort(np.concatenate([index, bad]))
        good = pa.array(order, mask=order >= len(index))
        columns = [column.take(good) for column in columns]
        words = pa.array([reason for _, reason in batch.rejected], pa.string())
        reasons = words.take(pa.array(order - len(index), mask=order < len(index)))
        index = np.concatenate([index, bad])[order]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ANSWER) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays([pa.array(index), *columns, reasons], schema=ANSWER))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _verdict_columns(head: Head, judged: Judged, batch: Batch) -> list[pa.Array]:
    """Columns of `ANSWER` from `flow_id` to `reasons`, one row per good flow."""
    count, alarms = len(batch.index), _alarms(judged)
    kinds, windows = pa.nulls(count, pa.string()), pa.nulls(count, pa.string())
    lengths = np.zeros(count, np.int32)
    if len(alarms.places):
        place = np.full(count, -1)
        place[alarms.places] = np.arange(len(alarms.places))
        taken = pa.array(place, mask=place < 0)
        kinds = pa.array(alarms.kinds, pa.string()).take(taken)
        windows = pa.array(alarms.windows, pa.string()).take(taken)
        lengths[alarms.places] = [len(reasons) for reasons in alarms.reasons]
    flat = [reason for reasons in alarms.reasons for reason in reasons]
    parts = [pa.array([reason[field.name] for reason in flat], field.type) for field in _REASON]
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    reasons = pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(parts, fields=list(_REASON)))
    alarm = pa.array(judged.first_alarm, mask=judged.first_alarm == 0)
    return [
        pa.array(batch.flow_ids, pa.string()),
        _LABELS.take(pa.array(judged.malicious.astype(np.int8))),
        pa.array(judged.score),
        pa.repeat(pa.scalar(head.threshold, pa.float64()), count),
        kinds,
        windows,
        pa.array(judged.warm),
        alarm.cast(pa.timestamp("ms", "UTC")),
        pa.repeat(head.model_version, count),
        pa.repeat(head.view_version, count),
        reasons,
    ]
