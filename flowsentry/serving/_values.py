"""From the values of a column, as they came, to the arrays of canonical reports, and the rules that these must obey.

What comes out is what the offline path reads from a file with the same flows, and a flow is rejected for the rules of
`flows.expectations`. A column is converted in one go if all its values are ordinary, and value by value only if one is
not. Reasons are fixed words; they never contain any part of the input.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import numpy as np

from flowsentry.flows.columns import transport_number
from flowsentry.flows.hashing import compiled, hash_bytes
from flowsentry.flows.schema import MAX_COUNT, MAX_DURATION_NS, MAX_PORT, TRANSPORTS, is_address

MAX_FLOW_ID: Final = 256
"""Characters of the longest flow id."""
COLUMNS: Final = (
    *("flow_id", "final", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "time", "duration"),
    "packets",
)
"""What a flow has, in the order of the canonical schema."""

MISSING: Final = -(2**63)
"""Stands for a missing port or count."""
RULES: Final = {
    1: f"src_port is not within 0..{MAX_PORT}",
    2: f"dst_port is not within 0..{MAX_PORT}",
    4: f"bytes is not within 0..{MAX_COUNT}",
    8: f"duration is not within 0..{MAX_DURATION_NS}",
    16: f"packets is not within 0..{MAX_COUNT}",
    32: "a port is missing although transport is tcp or udp",
    64: "time is ahead of the service's clock",
}
NOT_AN_OBJECT: Final = "not a JSON object"
REASONS: Final = (
    NOT_AN_OBJECT,
    *(f"{name} is missing" for name in ("flow_id", "src_ip", "dst_ip", "bytes", "time", "duration")),
    *(f"{name} is not a whole number" for name in ("src_port", "dst_port", "bytes", "duration", "packets")),
    *(f"{name} is not an IPv4 or IPv6 address" for name in ("src_ip", "dst_ip")),
    "flow_id is not text",
    f"flow_id is longer than {MAX_FLOW_ID} characters",
    "final is not true or false",
    "transport is not known",
    "time is not a timestamp",
    *RULES.values(),
)
"""Every reason that a flow can be rejected for."""


class Rejects:
    """Why flows are rejected: a flow for the first value that cannot be read, else for a rule that it breaks."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, str]] = {}

    def unreadable(self, place: int, column: str, reason: str) -> None:
        self._add(place, (COLUMNS.index(column), reason))

    def broken(self, place: int, reason: str) -> None:
        self._add(place, (len(COLUMNS), reason))

    def not_an_object(self, place: int) -> None:
        self._add(place, (-1, NOT_AN_OBJECT))

    def _add(self, place: int, found: tuple[int, str]) -> None:
        self._found[place] = min(found, self._found.get(place, found))

    def __bool__(self) -> bool:
        return bool(self._found)

    def listed(self) -> list[tuple[int, str]]:
        return [(place, reason) for place, (_, reason) in sorted(self._found.items())]


@dataclass
class Fields:
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
    """int64, `MISSING` where missing."""
    dst_port: np.ndarray
    transport: np.ndarray
    bytes: np.ndarray
    time: np.ndarray
    """int64, us since 1970."""
    duration: np.ndarray
    packets: np.ndarray | None
    """int64, `MISSING` where missing; None if no flow has them."""
    texts: Callable[[], dict[str, Sequence[Any]]]
    """src_ip, dst_ip and transport as given."""


def fields(values: Mapping[str, Sequence[Any]], count: int, rejects: Rejects) -> Fields:
    ids = flow_ids(values["flow_id"], rejects)
    source, destination, book = addresses(values["src_ip"], values["dst_ip"], rejects)
    packets = values.get("packets")
    return Fields(
        ids,
        hash_bytes(*encoded(ids)),
        flags(values["final"], rejects),
        book.hashes[source],
        book.hashes[destination],
        book.ipv6[source],
        whole("src_port", values["src_port"], rejects, optional=True),
        whole("dst_port", values["dst_port"], rejects, optional=True),
        transports(values["transport"], rejects),
        whole("bytes", values["bytes"], rejects),
        times(values["time"], rejects),
        whole("duration", values["duration"], rejects),
        None if packets is None else whole("packets", packets, rejects, optional=True),
        lambda: {name: values[name] for name in ("src_ip", "dst_ip", "transport")},
    )


def flow_ids(values: Sequence[Any], rejects: Rejects) -> list[str]:
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


def encoded(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (int64 [texts + 1]) and UTF-8 (uint8) of the texts one after the other."""
    joined = "".join(texts)
    pieces: Sequence[str] | list[bytes] = texts if joined.isascii() else [text.encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, pieces), np.int64, len(texts)), out=offsets[1:])
    return offsets, np.frombuffer(joined.encode(), np.uint8)


def flags(values: Sequence[Any], rejects: Rejects) -> np.ndarray:
    if set(map(type, values)) <= {bool, type(None)}:
        return np.array(values, bool)
    flags = np.zeros(len(values), bool)
    for place, value in enumerate(values):
        if type(value) is bool:
            flags[place] = value
        elif value is not None and value != "":
            rejects.unreadable(place, "final", "final is not true or false")
    return flags


class Book:
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
        self.hashes[begin : begin + len(addresses)] = hash_bytes(*encoded(addresses))
        self.ipv6[begin : begin + len(addresses)] = [":" in address for address in addresses]
        for place, address in enumerate(addresses, begin):
            self.places[address] = place


_book = Book(Book.CAPACITY)
_book_lock = threading.Lock()


def _learn(texts: Iterable[Any]) -> Book:
    """A book that has all addresses among the texts."""
    global _book  # noqa: PLW0603
    valid = [text for text in {text for text in texts if type(text) is str} if text in _book.places or is_address(text)]
    with _book_lock:
        new = [text for text in valid if text not in _book.places]
        if len(new) > _book.room():
            book, new = Book(max(Book.CAPACITY, len(valid))), valid
        else:
            book = _book
        book.add(new)
        _book = book
        return book


def addresses(
    sources: Sequence[Any], destinations: Sequence[Any], rejects: Rejects
) -> tuple[np.ndarray, np.ndarray, Book]:
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


def transports(values: Sequence[Any], rejects: Rejects) -> np.ndarray:
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


def whole(name: str, values: Sequence[Any], rejects: Rejects, *, optional: bool = False) -> np.ndarray:
    """Whole numbers of 64 bits; 5.0 is one, true and "5" are none."""
    kinds = set(map(type, values))
    try:
        if kinds == {int}:
            return np.fromiter(values, np.int64, len(values))
        if optional and kinds <= {int, type(None)}:
            return np.array([MISSING if value is None else value for value in values], np.int64)
    except OverflowError:
        pass
    numbers = np.full(len(values), MISSING if optional else 0, np.int64)
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
LAST_MS: Final = 9_214_646_400_000
"""Beginning of the year 2262: nanoseconds since 1970 fit into 64 bits until then."""
_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d)(?::?(\d\d))?)?", re.ASCII
)


def times(values: Sequence[Any], rejects: Rejects) -> np.ndarray:
    """Microseconds since 1970, what is finer is cut off."""
    kinds = set(map(type, values))
    if kinds == {str}:
        times = np.empty(len(values), np.int64)
        if _instants(*encoded(values), times) == 0:
            return times
    elif kinds == {int} and min(values) >= 0 and max(values) < LAST_MS:
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
        if 0 <= time < LAST_MS * 1000:
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
    """Which of `RULES` every flow breaks, as bits in `broken` int64 [flows]; returns how many break one."""
    count = 0
    for i in range(len(broken)):
        rules = 0
        for port, rule in ((src_port[i], 1), (dst_port[i], 2)):
            if port == MISSING:
                if transport[i] in (6, 17):
                    rules |= 32
            elif port < 0 or port > MAX_PORT:
                rules |= rule
        if sizes[i] < 0 or sizes[i] > MAX_COUNT:
            rules |= 4
        if duration[i] < 0 or duration[i] > MAX_DURATION_NS:
            rules |= 8
        if len(packets) > 0 and packets[i] != MISSING and (packets[i] < 0 or packets[i] > MAX_COUNT):
            rules |= 16
        if time[i] // 1000 > latest:
            rules |= 64
        broken[i] = rules
        if rules:
            count += 1
    return count


_NO_PACKETS: Final = np.empty(0, np.int64)


def check(fields: Fields, rejects: Rejects, *, latest_ms: int) -> None:
    """Reject the flows that break a rule; none may be later than `latest_ms`, ms since 1970."""
    broken = np.empty(len(fields.flow_ids), np.int64)
    packets = _NO_PACKETS if fields.packets is None else fields.packets
    if not _broken_rules(
        *(fields.src_port, fields.dst_port, fields.transport, fields.bytes, fields.time, fields.duration),
        *(packets, latest_ms, broken),
    ):
        return
    for place in np.flatnonzero(broken).tolist():
        for rule, reason in RULES.items():
            if broken[place] & rule:
                rejects.broken(place, reason)
    for name, ports in (("src_port", fields.src_port), ("dst_port", fields.dst_port)):
        # A port has 32 bits in the canonical schema.
        beyond = (ports != ports.astype(np.int32)) & (ports != MISSING)
        for place in np.flatnonzero(beyond).tolist():
            rejects.unreadable(place, name, f"{name} is not a whole number")
