"""Arrow IPC streams from outside: everything that could cost memory or time is refused before it is decoded.

A record batch of a few hundred bytes may claim to hold gigabytes: compressed, or by its lengths. Its description (a
flatbuffer, see format/Message.fbs of Apache Arrow) is read first, then the columns of flows are decoded, then every
offset and text is checked. Other columns are never decoded.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import numpy as np
import pyarrow as pa

from flowsentry.flows.hashing import hash_bytes
from flowsentry.serving._values import (
    COLUMNS,
    LAST_MS,
    MAX_FLOW_ID,
    Book,
    Fields,
    Rejects,
    addresses,
    encoded,
    flags,
    flow_ids,
    times,
    transports,
    whole,
)

MAX_BATCHES: Final = 1000
"""Record batches and dictionaries in one request."""

# Fields of the flatbuffer tables.
_HEADER, _LENGTH, _COMPRESSION, _DICTIONARY_DATA = 2, 0, 3, 1


class NotArrow(Exception):
    """Why the stream is refused, in fixed words."""


class TooManyRows(Exception):
    """More rows than are allowed."""


def read(body: bytes | memoryview, max_rows: int) -> pa.Table:
    """The known columns of a stream, checked, each in one chunk.

    Raises:
        NotArrow: it is damaged, compressed, has a column twice, or one of a nested or extension type.
        TooManyRows: it describes more than `max_rows` rows.
    """
    try:
        rows = _inspect(pa.py_buffer(body), max_rows)
        with pa.ipc.open_stream(body) as stream:
            schema = stream.schema
        wanted = [place for place, field in enumerate(schema) if field.name in COLUMNS]
        names = [schema.field(place).name for place in wanted]
        if len(set(names)) < len(names):
            raise NotArrow("a column is there twice")
        if any(not _is_flat(schema.field(place).type) for place in wanted):
            raise NotArrow("a column is of a nested or extension type")
        if not wanted:  # no included field would mean all
            return pa.table({"flow_id": pa.nulls(rows)})
        options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        with pa.ipc.open_stream(body, options=options) as stream:
            table = stream.read_all()
        table.validate(full=True)
        return table.combine_chunks()
    except (pa.ArrowException, struct.error, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        raise NotArrow("the body is not an Arrow IPC stream") from error


def _inspect(body: pa.Buffer, max_rows: int) -> int:
    """Look at what the messages say of themselves, without decoding any; returns the number of rows."""
    rows = batches = 0
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type not in ("record batch", "dictionary"):
            continue
        batches += 1
        if batches > MAX_BATCHES:
            raise NotArrow("the stream has too many record batches")
        description = memoryview(message.metadata)
        place = _table(description, struct.unpack_from("<I", description)[0], _HEADER)
        if message.type == "dictionary":
            place = _table(description, place, _DICTIONARY_DATA)
        if _field(description, place, _COMPRESSION):
            raise NotArrow("compressed record batches are not accepted")
        if message.type == "record batch":
            length = _field(description, place, _LENGTH)
            rows += struct.unpack_from("<q", description, length)[0] if length else 0
            if not 0 <= rows <= max_rows:
                raise TooManyRows
    return int(rows)


def _field(description: memoryview, table: int, number: int) -> int:
    """Where a field of a flatbuffer table is; 0 if it is not there."""
    (back,) = struct.unpack_from("<i", description, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", description, vtable)
    entry = 4 + 2 * number
    if entry + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", description, vtable + entry)
    return table + int(offset) if offset else 0


def _table(description: memoryview, table: int, number: int) -> int:
    """Where the table is that a field refers to."""
    place = _field(description, table, number)
    if not place:
        raise NotArrow("the body is not an Arrow IPC stream")
    return place + int(struct.unpack_from("<I", description, place)[0])


_TEXTS: Final = {kind.id for kind in (pa.string(), pa.large_string())}
_FLAT: Final = {
    *_TEXTS,
    *(kind.id for kind in (pa.null(), pa.bool_(), pa.timestamp("ms"), pa.float16(), pa.float32(), pa.float64())),
    *(kind.id for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *(kind.id for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
}


def _is_flat(kind: pa.DataType) -> bool:
    return kind.value_type.id in _TEXTS if pa.types.is_dictionary(kind) else kind.id in _FLAT


def fields(table: pa.Table, rejects: Rejects) -> Fields:
    """All rows of a table that `read` gave, as arrays."""
    count = table.num_rows
    arrays = {name: _one_chunk(table.column(name)) for name in table.column_names}
    nothing = pa.nulls(count)
    given: dict[str, pa.Array] = {name: arrays.get(name, nothing) for name in COLUMNS}
    ids, hashes = _flow_ids(given["flow_id"], rejects)
    source, destination, book = _addresses(given["src_ip"], given["dst_ip"], rejects)
    return Fields(
        ids,
        hashes,
        _flags(given["final"], rejects),
        book.hashes[source],
        book.hashes[destination],
        book.ipv6[source],
        _whole("src_port", given["src_port"], rejects, optional=True),
        _whole("dst_port", given["dst_port"], rejects, optional=True),
        _transports(given["transport"], rejects),
        _whole("bytes", given["bytes"], rejects),
        _times(given["time"], rejects),
        _whole("duration", given["duration"], rejects),
        _whole("packets", given["packets"], rejects, optional=True) if "packets" in arrays else None,
        lambda: {name: _objects(given[name]) for name in ("src_ip", "dst_ip", "transport")},
    )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _objects(array: pa.Array) -> list[Any]:
    """As Python objects."""
    if pa.types.is_dictionary(array.type):
        # Few bytes can stand for a long text in every row; no column has a good text of more than MAX_FLOW_ID.
        long = MAX_FLOW_ID
        texts = [text and (text if len(text) <= long else f"{text[:long]}…") for text in array.dictionary.to_pylist()]
        return [None if place is None else texts[place] for place in array.indices.to_pylist()]
    if pa.types.is_timestamp(array.type):
        # As text it is no time, and as Python's own it could be out of range.
        return [None if value is None else math.inf for value in array.cast(pa.int64()).to_pylist()]
    if pa.types.is_floating(array.type):
        return [None if value is None or math.isnan(value) else value for value in array.to_pylist()]
    values: list[Any] = array.to_pylist()
    return values


def _flow_ids(array: pa.Array, rejects: Rejects) -> tuple[list[str], np.ndarray]:
    if array.type.id in _TEXTS and not array.null_count and len(array):
        _, starts, content = array.buffers()
        width: Any = np.int64 if pa.types.is_large_string(array.type) else np.int32
        offsets = np.frombuffer(starts, width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
        lengths = np.diff(offsets)
        if lengths.min() > 0 and lengths.max() <= MAX_FLOW_ID:
            return array.to_pylist(), hash_bytes(offsets, np.frombuffer(content, np.uint8))
    ids = flow_ids(_objects(array), rejects)
    return ids, hash_bytes(*encoded(ids))


def _addresses(source: pa.Array, destination: pa.Array, rejects: Rejects) -> tuple[np.ndarray, np.ndarray, Book]:
    """As `addresses`, which looks up every distinct address once here."""
    if all(end.type.id in _TEXTS and not end.null_count and len(end) for end in (source, destination)):
        coded = [end.dictionary_encode() for end in (source, destination)]
        texts = [end.dictionary.to_pylist() for end in coded]
        passed = Rejects()
        known = addresses([*texts[0], *texts[1]], [*texts[0], *texts[1]], passed)
        if not passed:
            places, _, book = known
            first, second = (end.indices.to_numpy() for end in coded)
            return places[first], places[len(texts[0]) :][second], book
    return addresses(_objects(source), _objects(destination), rejects)


def _transports(array: pa.Array, rejects: Rejects) -> np.ndarray:
    if array.type.id in _TEXTS and not array.null_count:
        coded, passed = array.dictionary_encode(), Rejects()
        numbers = transports(coded.dictionary.to_pylist(), passed)
        if not passed:
            return np.asarray(numbers[coded.indices.to_numpy()])
    return transports(_objects(array), rejects)


def _flags(array: pa.Array, rejects: Rejects) -> np.ndarray:
    if pa.types.is_boolean(array.type):
        whether = array.fill_null(False) if array.null_count else array
        return np.asarray(whether.to_numpy(zero_copy_only=False), bool)
    return flags(_objects(array), rejects)


def _whole(name: str, array: pa.Array, rejects: Rejects, *, optional: bool = False) -> np.ndarray:
    if pa.types.is_integer(array.type) and not array.null_count:
        numbers = array.to_numpy()
        if array.type != pa.uint64() or (numbers < 2**63).all():
            return np.array(numbers, np.int64)
    return whole(name, _objects(array), rejects, optional=optional)


_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _times(array: pa.Array, rejects: Rejects) -> np.ndarray:
    if not pa.types.is_timestamp(array.type):
        return times(_objects(array), rejects)
    per_second = _PER_SECOND[array.type.unit]
    if array.null_count:
        for place in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
            rejects.unreadable(place, "time", "time is missing")
        array = array.view(pa.int64()).fill_null(0)
    ticks = array.view(pa.int64()).to_numpy()
    outside = (ticks < 0) | (ticks >= LAST_MS // 1000 * per_second)
    if outside.any():
        for place in np.flatnonzero(outside).tolist():
            rejects.unreadable(place, "time", "time is not a timestamp")
        ticks = np.where(outside, 0, ticks)
    return np.asarray(ticks * (10**6 // per_second) if per_second <= 10**6 else ticks // 1000)
