"""Sources: from files of any known layout to reports in the canonical schema.

Layouts, told apart by content: CSV with comma or semicolon as published with the AssureMOSS dataset (4TU.ResearchData
20463687), Packetbeat flow events as NDJSON, either also gzipped, and Parquet with the published or our own columns.
A record that cannot be understood is set aside with its place and the reason; a file that cannot be understood is an
error.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import stat
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowsentry.errors import SourceError
from flowsentry.flows._layouts import (
    PUBLISHED,
    Layout,
    NoFlowsError,
    damaged_gzip,
    not_utf8,
    open_text,
    sniff,
    unreadable,
)
from flowsentry.flows._typing import Typer, connect, typed_columns
from flowsentry.flows.schema import BY_NAME, REQUIRED, SCHEMA, conform

MAX_LINE_BYTES: Final = 1 << 20
QUARANTINE: Final = ("file", "row", "reason", "raw")

_CHUNK_BYTES: Final = 1 << 25
_BATCH_ROWS: Final = 1 << 15
_PROGRESS_SECONDS: Final = 5.0
_SUFFIXES: Final = {".gz", ".csv", ".txt", ".json", ".jsonl", ".ndjson", ".log", ".parquet"}


@dataclass(frozen=True)
class Loaded:
    """What was read. `rows_read == len(reports) + len(quarantine)` always."""

    reports: pd.DataFrame
    """Canonical schema; recordings follow one another, each in order of time (ties: order in the files)."""
    quarantine: pd.DataFrame
    """Records that are no reports: file, row, reason, raw (at most 500 characters)."""
    rows_read: int
    files: dict[str, str]
    """Name of every file (the `file` column) with the SHA-256 (hex) of its content as stored."""
    layouts: dict[str, str]
    """Name of every file with its layout in words."""


def read(data: Sequence[str | Path], on_progress: Callable[[str], None] | None = None) -> Loaded:
    """Read recordings.

    Args:
        data: one recording each: a file, a folder (its files, without hidden ones, unfinished downloads and text that
            has nothing to do with flows) or a glob. A recording is named after its file or folder.
        on_progress: is told about files that take longer than a few seconds, and about files passed over.

    `row` is the number of the record in its file: in text the line, not counting the header, the first is 1; empty
    lines are counted but are no records. Columns that only some recordings have are missing in the others; truth
    columns are kept only if all have them. A Parquet file's own `recording`, `file`, `row` and derived columns are
    replaced.

    Raises:
        SourceError: an entry or a file is missing, unreadable, empty, damaged, of an unknown layout, or of another
            layout than the other files of its recording.
    """
    say = on_progress or (lambda message: None)
    entries, names = _entries(data, say)
    taken: set[str] = set()
    recordings, rejects, digests, layouts = [], [], {}, {}
    connection = connect()
    try:
        for (recording, files), entry in zip(entries, data, strict=True):
            parts = [_read_file(connection, path, layout, names[path], say) for path, layout in files.items()]
            for part in parts:
                digests[part.name], layouts[part.name] = part.digest, str(part.layout)
                rejects.append(part.quarantine)
            table = _in_order(parts)
            if table.num_rows == 0 and not any(len(part.quarantine) for part in parts):
                raise SourceError(f"{entry} has a header but no rows; give a file with flows")
            recordings.append(_with_constant(table, "recording", _unique(_printable(recording), taken)))
    finally:
        connection.close()
    reports = _to_pandas(_one_table(recordings))
    quarantine = pd.concat(rejects, ignore_index=True)
    return Loaded(reports, quarantine, len(reports) + len(quarantine), digests, layouts)


def check(data: Sequence[str | Path]) -> None:
    """Find the files and tell their layouts, in a moment, before anything slow begins.

    Raises:
        SourceError: as `read`, for what can be told from the beginning of the files.
    """
    _entries(data, lambda message: None)


def digests(data: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 (hex) of every file that `read` would read, by the name that it would give it.

    Raises:
        SourceError: as `read`, for what can be told without reading the rows.
    """
    _, names = _entries(data, lambda message: None)
    return {name: _digest(path) for path, name in names.items()}


def recordings(data: Sequence[str | Path]) -> list[tuple[str, list[Path]]]:
    """Name and files of every recording that `read` would read.

    Raises:
        SourceError: as `check`.
    """
    entries, _ = _entries(data, lambda message: None)
    return [(recording, list(files)) for recording, files in entries]


def _entries(
    data: Sequence[str | Path], say: Callable[[str], None]
) -> tuple[list[tuple[str, dict[Path, Layout]]], dict[Path, str]]:
    """The recordings with their files, and the name of every file: short where that is clear."""
    if not data:
        raise SourceError("no data given; name a file, a folder or a glob with --data")
    entries = [_files_of(str(entry), say) for entry in data]
    paths = [path for _, files in entries for path in files]
    resolved = Counter(path.resolve() for path in paths)
    for path in paths:
        if resolved[path.resolve()] > 1:
            raise SourceError(f"{path} is given twice; name every file once")
    basenames = Counter(path.name for path in paths)
    return entries, {path: _printable(path.name if basenames[path.name] == 1 else str(path)) for path in paths}


@dataclass(frozen=True)
class _Part:
    """One file, read."""

    name: str
    table: pa.Table
    quarantine: pd.DataFrame
    digest: str
    layout: Layout


def _files_of(entry: str, say: Callable[[str], None]) -> tuple[str, dict[Path, Layout]]:
    """Name of the recording, and its files with their layouts, all alike."""
    if not entry:
        raise SourceError("no data given; name a file, a folder or a glob with --data")
    path = Path(entry)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = 0
    except (OSError, ValueError) as error:
        why = error if isinstance(error, OSError) else OSError(0, str(error))
        raise unreadable(path, why) from error
    searched = True
    if stat.S_ISREG(kind):
        found, searched, name = [path], False, path.name
    elif stat.S_ISDIR(kind):
        try:
            found, name = _data_files(path.iterdir()), path.resolve().name
        except OSError as error:
            raise unreadable(path, error) from error
    elif kind:
        raise SourceError(f"{entry} is neither a file nor a folder; save the flows to a file first")
    elif glob.has_magic(entry):
        # Path.glob() knows no absolute patterns.
        found = _data_files(Path(match) for match in glob.glob(entry, recursive=True))  # noqa: PTH207
        name = next((part for part in reversed(path.parts[:-1]) if not glob.has_magic(part)), "") or "flows"
        if not found:
            raise SourceError(f"{entry} matches no file; check the pattern given with --data")
    else:
        raise unreadable(path, FileNotFoundError())
    layouts: dict[Path, Layout] = {}
    for file in found:
        try:
            layouts[file] = sniff(file)
        except NoFlowsError as error:
            if not searched:
                raise
            say(f"passing over {file}: no flows ({error})")
            continue
        first = next(iter(layouts))
        if not layouts[first].matches(layouts[file]):
            raise SourceError(
                f"{entry} mixes layouts: {first.name} is {layouts[first]}, {file.name} is {layouts[file]}"
                f"{_difference(layouts[first], layouts[file])}; give them as two recordings"
            )
    if not layouts:
        raise SourceError(f"{entry} has no file with flows; put CSV, NDJSON or Parquet files there")
    while stat.S_ISREG(kind) and Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    return name, layouts


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Regular files in order of name, without hidden ones and unfinished downloads."""
    return sorted(
        path for path in paths if not path.name.startswith(".") and path.suffix.lower() != ".part" and path.is_file()
    )


def _difference(one: Layout, other: Layout) -> str:
    only = sorted(set(one.columns) ^ set(other.columns))
    return f" (only one of them has {', '.join(only[:3])})" if one.kind == other.kind and only else ""


def _printable(name: str) -> str:
    """A name from the file system as valid text: names there are bytes of any kind."""
    return name.encode("utf-8", "backslashreplace").decode()


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    taken.add(unique)
    return unique


def _read_file(connection: Any, path: Path, layout: Layout, name: str, say: Callable[[str], None]) -> _Part:
    """Type every record of a file and set the bad ones aside."""
    good: list[pa.RecordBatch] = []
    bad: list[pa.Table] = []
    begun = told = time.monotonic()
    seen = 0
    for batch, share in _typed(connection, path, layout):
        seen += batch.num_rows
        _sort_out(batch, good, bad)
        now = time.monotonic()
        if now - told > _PROGRESS_SECONDS:
            told = now
            say(f"reading {name}: {seen:,} rows, {share:.0%} of the file")
    digest = _digest(path)
    if told > begun:
        say(f"read {name}: {seen:,} rows in {time.monotonic() - begun:.0f} s")
    fields = [pa.field("row", pa.int64()), *(_field(column) for column in typed_columns(layout))]
    schema = pa.schema(fields)
    table = pa.Table.from_batches(good, schema).unify_dictionaries() if good else schema.empty_table()
    quarantine = pa.concat_tables(bad).to_pandas() if bad else pd.DataFrame(columns=["row", "reason", "raw"])
    quarantine.insert(0, "file", name)
    quarantine = quarantine.astype({"file": object, "row": "int64", "reason": object, "raw": object})
    return _Part(name, _with_constant(table, "file", name), quarantine, digest, layout)


def _typed(connection: Any, path: Path, layout: Layout) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Typed rows of a file in its order, each with the share of the file that was read."""
    typer = Typer(connection, layout)
    try:
        chunks = _parquet_chunks(path, layout) if layout.kind.endswith("Parquet") else _line_chunks(path, layout)
        for chunk, share in chunks:
            for batch in typer(chunk):
                yield batch, share
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged_gzip(path, error) from error
    except (duckdb.Error, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _field(name: str) -> pa.Field:
    kinds = {
        "category": pa.dictionary(pa.int32(), pa.large_string()),
        "string[pyarrow]": pa.large_string(),
        "bool": pa.bool_(),
        "Int32": pa.int32(),
        "int64": pa.int64(),
        "Int64": pa.int64(),
    }
    return pa.field(name, kinds.get(BY_NAME[name].dtype, pa.timestamp("us", "UTC")))


def _sort_out(batch: pa.RecordBatch, good: list[pa.RecordBatch], bad: list[pa.Table]) -> None:
    reason = batch.column("reason")
    if reason.null_count < batch.num_rows:
        bad.append(pa.Table.from_batches([batch.filter(pc.is_valid(reason))]).select(["row", "reason", "raw"]))
        batch = batch.filter(pc.is_null(reason))
    names = [name for name in batch.schema.names if name not in ("reason", "raw")]
    arrays = [_as(batch.column(name), _field(name).type) for name in names]
    good.append(pa.RecordBatch.from_arrays(arrays, names))


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return array.cast(kind.value_type).dictionary_encode()
    return array.cast(kind)


def _line_chunks(path: Path, layout: Layout) -> Iterator[tuple[pa.Table, float]]:
    """Lines of a text file as chunks of `row` and `record`, with the share of the file that was read."""
    header = 1 if layout.kind == "published CSV" else 0
    size = max(1, path.stat().st_size)
    line = 0
    with open_text(path, layout) as file:
        raw: Any = getattr(file, "fileobj", file)
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        rest = b""
        while block := file.read(_CHUNK_BYTES):
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest += block
                if len(rest) > MAX_LINE_BYTES:
                    raise _too_long(path, line + 1)
                continue
            yield _lines(path, rest + block[:cut], line, header), raw.tell() / size
            line += block.count(b"\n", 0, cut)
            rest = block[cut:]
        if rest:
            yield _lines(path, rest + b"\n", line, header), 1.0


def _lines(path: Path, text: bytes, before: int, header: int) -> pa.Table:
    """A table of the lines in `text`, which ends with a newline; `before` lines came before it."""
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(path, text[error.start], before + text.count(b"\n", 0, error.start) + 1) from error
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    lengths = np.diff(offsets)
    if lengths.max() > MAX_LINE_BYTES:
        raise _too_long(path, before + int(np.argmax(lengths > MAX_LINE_BYTES)) + 1)
    records = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text))
    rows = pa.array(np.arange(before + 1, before + len(ends) + 1) - header)
    skip = max(0, header - before)
    table = pa.table({"row": rows[skip:], "record": pc.ascii_rtrim(records[skip:], "\r\n")})
    return pa.Table.from_batches(table.to_batches(_BATCH_ROWS), table.schema)


def _too_long(path: Path, line: int) -> SourceError:
    return SourceError(f"{path}: line {line} is longer than 1 MiB; no record of a known layout is, repair the file")


def _parquet_chunks(path: Path, layout: Layout) -> Iterator[tuple[pa.Table, float]]:
    with pq.ParquetFile(path) as file:
        columns = [name for name in dict.fromkeys(layout.columns) if name in _known(layout)]
        row = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            rows = pa.array(np.arange(row + 1, row + len(batch) + 1))
            row += len(batch)
            names = [name for name in columns if name != "row"]
            yield (
                pa.table({"row": rows, **{name: batch.column(name) for name in names}}),
                row / max(1, file.metadata.num_rows),
            )


def _known(layout: Layout) -> set[str]:
    return set(PUBLISHED.values()) if layout.kind == "published Parquet" else set(BY_NAME)


def _with_constant(table: pa.Table, name: str, value: str) -> pa.Table:
    codes = pa.array(np.zeros(table.num_rows, np.int32))
    column = pa.DictionaryArray.from_arrays(codes, pa.array([value], pa.large_string()))
    return table.append_column(name, column)


def _in_order(parts: list[_Part]) -> pa.Table:
    """The files of a recording as one table in order of time; within equal times the order of files and rows stays."""

    def first(part: _Part) -> tuple[bool, int, str]:
        times = part.table.column("time").cast(pa.int64())
        return (part.table.num_rows == 0, times[0].as_py() if part.table.num_rows else 0, part.name)

    ordered = sorted(parts, key=first)
    table = pa.concat_tables([part.table for part in ordered], promote_options="default").unify_dictionaries()
    times = table.column("time").cast(pa.int64()).to_numpy()
    if np.all(times[1:] >= times[:-1]):
        return table
    return table.take(pa.array(np.argsort(times, kind="stable")))


def _one_table(recordings: list[pa.Table]) -> pa.Table:
    """All recordings below one another; exchanges of different recordings get different numbers."""
    for column in SCHEMA:
        if column.presence == "truth" and not all(column.name in table.column_names for table in recordings):
            recordings = [
                table.drop_columns([column.name]) if column.name in table.column_names else table
                for table in recordings
            ]
    if len(recordings) > 1 and "exchange" in recordings[0].column_names:
        begin, shifted = 0, []
        for table in recordings:
            numbers = table.column("exchange").to_numpy()
            unique, numbers = np.unique(numbers, return_inverse=True)
            place = table.column_names.index("exchange")
            shifted.append(table.set_column(place, "exchange", pa.array(numbers.astype(np.int64) + begin)))
            begin += len(unique)
        recordings = shifted
    return pa.concat_tables(recordings, promote_options="default").unify_dictionaries()


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    dtypes = {pa.large_string(): pd.StringDtype("pyarrow")}
    columns = {}
    for column in SCHEMA:
        if column.name not in table.column_names:
            continue
        chunked = table.column(column.name)
        table = table.drop_columns([column.name])
        if column.dtype in ("Int32", "Int64"):
            values = chunked.to_pandas(types_mapper=lambda kind, dtype=column.dtype: pd.api.types.pandas_dtype(dtype))
        else:
            values = chunked.to_pandas(types_mapper=dtypes.get)
        if column.presence == "source" and column.name not in REQUIRED and values.isna().all():
            continue
        columns[column.name] = values
    return conform(pd.DataFrame(columns, copy=False))


__all__ = ["QUARANTINE", "Loaded", "read"]
