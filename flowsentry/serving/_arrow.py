"""Arrow IPC streams from outside: everything that could cost memory or time is refused before it is decoded.

A record batch of a few hundred bytes may claim to hold gigabytes: compressed, or by its lengths. Its description (a
flatbuffer, see format/Message.fbs of Apache Arrow) is read first, then the columns of flows are decoded, then every
offset and text is checked. Other columns are never decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Final

import pyarrow as pa

MAX_BATCHES: Final = 1000
"""Record batches and dictionaries in one request."""

# Fields of the flatbuffer tables.
_HEADER, _LENGTH, _COMPRESSION, _DICTIONARY_DATA = 2, 0, 3, 1


class NotArrow(Exception):
    """Why the stream is refused, in fixed words."""


class TooManyRows(Exception):
    """More rows than are allowed."""


def read(body: bytes | memoryview, columns: Collection[str], max_rows: int) -> pa.Table:
    """The known columns of a stream, checked, each in one chunk.

    Raises:
        NotArrow: it is damaged, compressed, has a column twice, or one of a nested or extension type.
        TooManyRows: it describes more than `max_rows` rows.
    """
    try:
        _inspect(pa.py_buffer(body), max_rows)
        with pa.ipc.open_stream(body) as stream:
            schema = stream.schema
        wanted = [place for place, field in enumerate(schema) if field.name in columns]
        names = [schema.field(place).name for place in wanted]
        if len(set(names)) < len(names):
            raise NotArrow("a column is there twice")
        if any(not _is_flat(schema.field(place).type) for place in wanted):
            raise NotArrow("a column is of a nested or extension type")
        options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        with pa.ipc.open_stream(body, options=options) as stream:
            table = stream.read_all()
        table.validate(full=True)
        return table.combine_chunks()
    except (pa.ArrowException, struct.error, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        raise NotArrow("the body is not an Arrow IPC stream") from error


def _inspect(body: pa.Buffer, max_rows: int) -> None:
    """Look at what the messages say of themselves, without decoding any."""
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


def _is_flat(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    tests = ("null", "boolean", "integer", "floating", "string", "large_string", "timestamp")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)
