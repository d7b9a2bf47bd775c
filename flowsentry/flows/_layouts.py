"""What a file holds, decided by its content: compression, layout and columns, never by its name."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from flowsentry.errors import SourceError
from flowsentry.flows.schema import REQUIRED, SCHEMA

Kind = Literal["published CSV", "Packetbeat NDJSON", "published Parquet", "canonical Parquet"]

HEAD_BYTES: Final = 1 << 20
"""How much of the (unpacked) beginning of a file is looked at."""

PUBLISHED: Final = {
    "flow_id": "_source_flow_id",
    "final": "_source_flow_final",
    "src_ip": "_source_source_ip",
    "dst_ip": "_source_destination_ip",
    "src_port": "_source_source_port",
    "dst_port": "_source_destination_port",
    "transport": "_source_network_transport",
    "bytes": "_source_network_bytes",
    "time": "_source_@timestamp",
    "duration": "_source_event_duration",
    "label": "label",
    "packets": "_source_network_packets",
}
"""Our columns and those of the AssureMOSS Kubernetes Run-time Monitoring Dataset (4TU.ResearchData 20463687)."""
PUBLISHED_OPTIONAL: Final = ("label", "packets")

_ENDS: Final = {"src": "source", "dst": "destination"}
PACKETBEAT: Final[dict[str, tuple[str, ...]]] = {
    "flow_id": ("flow.id",),
    "final": ("flow.final",),
    "src_ip": ("source.ip",),
    "dst_ip": ("destination.ip",),
    "src_port": ("source.port",),
    "dst_port": ("destination.port",),
    "transport": ("network.transport",),
    "bytes": ("network.bytes",),
    "time": ("@timestamp",),
    "duration": ("event.duration",),
    "label": ("label",),
    "packets": ("network.packets",),
    "start": ("event.start",),
    "end": ("event.end",),
    **{f"{ours}_{what}": (f"{ecs}.{what}",) for ours, ecs in _ENDS.items() for what in ("bytes", "packets")},
    **{f"{ours}_namespace": (f"{ecs}.kubernetes.namespace",) for ours, ecs in _ENDS.items()},
    **{
        f"{ours}_workload": tuple(
            f"{ecs}.kubernetes.{owner}.name"
            for owner in ("deployment", "statefulset", "daemonset", "cronjob", "job", "pod")
        )
        for ours, ecs in _ENDS.items()
    },
}
"""Our columns and the ECS fields of a Packetbeat flow event, the first that is there counts. Packetbeat itself knows
the workload of one end only, without saying which; the fields of both ends are those of its
`add_kubernetes_metadata` processor, moved below `source` and `destination`. `label` is benign or malicious."""
_PACKETBEAT_MUST: Final = ("@timestamp", "flow.id", "source.ip", "destination.ip")


class NoFlowsError(SourceError):
    """A file that has nothing to do with flows, such as a README beside the data."""


@dataclass(frozen=True)
class Layout:
    """How the records of a file are written."""

    kind: Kind
    columns: tuple[str, ...]
    """Names in the file's order; empty for NDJSON, whose events need not have the same fields."""
    delimiter: str = ""
    gzipped: bool = False

    def matches(self, other: Layout) -> bool:
        """Whether files of both layouts can make up one recording: the same but for compression."""
        mine = (self.kind, self.delimiter, sorted(self.columns))
        return mine == (other.kind, other.delimiter, sorted(other.columns))

    def __str__(self) -> str:
        separated = f", separated by {self.delimiter!r}" if self.delimiter else ""
        labelled = ", without label" if self.columns and "label" not in self.columns else ""
        return f"{self.kind}{separated}{labelled}{', gzip' if self.gzipped else ''}"


def sniff(path: Path) -> Layout:
    """Recognise the layout of a file.

    Raises:
        SourceError: the file cannot be opened, is empty or damaged, or its columns are not those of a known layout.
        NoFlowsError: it is text without a single column of a known layout.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            whole = len(head) < HEAD_BYTES
    except OSError as error:
        raise unreadable(path, error) from error
    if not head:
        raise SourceError(f"{path} is empty; give a file with flows")
    if head[:4] == b"PAR1":
        return _parquet(path)
    gzipped = head[:2] == b"\x1f\x8b"
    if gzipped:
        head, whole = _gunzip_head(path, head)
        if not head and whole:
            raise SourceError(f"{path} is empty inside its gzip; give a file with flows")
    text = _text(path, head, whole)
    if text.lstrip().startswith(("{", "[")):
        return _packetbeat(path, text, whole, gzipped)
    return _csv(path, text, gzipped)


def unreadable(path: Path, error: OSError) -> SourceError:
    """The one-line message for a file that the operating system does not let us read."""
    if isinstance(error, PermissionError):
        return SourceError(f"{path} cannot be read: permission denied; give this user the right to read it")
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{path} does not exist; check the path given with --data")
    return SourceError(f"{path} cannot be read: {error.strerror or error}")


def damaged_gzip(path: Path, why: object) -> SourceError:
    """The one-line message for gzip data that ends early or does not match its checksum."""
    return SourceError(f"{path} is a damaged or truncated gzip file ({why}); fetch it again")


def open_text(path: Path, layout: Layout) -> BinaryIO:
    """The unpacked bytes of a CSV or NDJSON file."""
    return cast(BinaryIO, gzip.open(path, "rb")) if layout.gzipped else path.open("rb")


def split_header(line: str, delimiter: str) -> list[str]:
    """The column names of a CSV header, without quotes and spaces around them."""
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]


def _gunzip_head(path: Path, head: bytes) -> tuple[bytes, bool]:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(head, HEAD_BYTES)
    except zlib.error as error:
        raise damaged_gzip(path, error) from error
    if not text and not unpacker.eof:
        raise damaged_gzip(path, "it ends before its first record")
    return text, unpacker.eof


def _text(path: Path, head: bytes, whole: bool) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise not_utf8(path, head[0], 1)
    if b"\0" in head[:4096]:
        raise SourceError(f"{path} is binary, neither CSV, NDJSON, gzip nor Parquet; unpack or convert it first")
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and error.start >= len(head) - 3:
            return head[: error.start].decode("utf-8-sig")
        if sum(byte < 32 and byte not in b"\t\n\r" for byte in head[:4096]) > 8:
            raise SourceError(
                f"{path} is binary, neither CSV, NDJSON, gzip nor Parquet; unpack or convert it first"
            ) from error
        raise not_utf8(path, head[error.start], head.count(b"\n", 0, error.start) + 1) from error


def not_utf8(path: Path, byte: int, line: int) -> SourceError:
    """The one-line message for text in another encoding."""
    return SourceError(f"{path} is not UTF-8: byte 0x{byte:02x} in line {line}; convert it, for instance with iconv")


def _csv(path: Path, text: str, gzipped: bool) -> Layout:
    header, newline, rest = text.partition("\n")
    if len(header) >= HEAD_BYTES - 4 and not newline:
        raise SourceError(f"{path}: line 1 is longer than 1 MiB; no known layout has such a field")
    known = set(PUBLISHED.values())
    try:
        readings = {delimiter: split_header(header, delimiter) for delimiter in ",;"}
    except csv.Error as error:
        raise NoFlowsError(f"{path}: its first line is no CSV header ({error})") from error
    delimiter, columns = max(readings.items(), key=lambda item: len(known.intersection(item[1])))
    if not known.intersection(columns) - {"label"}:
        delimiter, columns = max(readings.items(), key=lambda item: len(item[1]))
    twice = sorted({name for name in columns if name in known and columns.count(name) > 1})
    if twice:
        raise SourceError(f"{path}: column {twice[0]} is there twice; keep one of them")
    must = [name for ours, name in PUBLISHED.items() if ours not in PUBLISHED_OPTIONAL]
    _demand(path, must, columns, "published CSV layout")
    if not rest.strip():
        raise SourceError(f"{path} has a header but no rows; give a file with flows")
    return Layout("published CSV", tuple(columns), delimiter, gzipped)


def _packetbeat(path: Path, text: str, whole: bool, gzipped: bool) -> Layout:
    lines = text.splitlines()
    if len(lines) > 1 and not whole:
        lines.pop()
    found: dict[str, None] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            names = _flatten(event)
            found.update(dict.fromkeys(names))
            if all(name in names for name in _PACKETBEAT_MUST[:2]):
                return Layout("Packetbeat NDJSON", (), gzipped=gzipped)
    if not found:
        if len(lines) == 1 and len(lines[0]) >= HEAD_BYTES - 4:
            raise SourceError(f"{path}: line 1 is longer than 1 MiB; write one event to a line (NDJSON)")
        raise SourceError(f"{path} holds JSON, but not one object to a line; write one event to a line (NDJSON)")
    _demand(path, list(_PACKETBEAT_MUST), list(found), "Packetbeat flow events (NDJSON)")
    raise SourceError(f"{path}: no event has both @timestamp and flow.id; give Packetbeat's flow events")


def _flatten(event: dict[str, Any], prefix: str = "", depth: int = 0) -> list[str]:
    names = []
    for key, value in event.items():
        if isinstance(value, dict) and depth < 4:
            names += _flatten(value, f"{prefix}{key}.", depth + 1)
        else:
            names.append(prefix + key)
    return names


def _parquet(path: Path) -> Layout:
    try:
        schema = pq.read_schema(path)
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0][:200]
        raise SourceError(f"{path} is a damaged Parquet file ({why}); fetch or write it again") from error
    columns = list(schema.names)
    if set(PUBLISHED.values()).intersection(columns) - {"label"}:
        kind: Kind = "published Parquet"
        must = [name for ours, name in PUBLISHED.items() if ours not in PUBLISHED_OPTIONAL]
    else:
        kind = "canonical Parquet"
        must = [name for name in REQUIRED if name not in ("recording", "file", "row")]
    _demand(path, must, columns, f"{kind} layout")
    known = {*PUBLISHED.values()} if kind == "published Parquet" else {column.name for column in SCHEMA}
    twice = sorted({name for name in columns if name in known and columns.count(name) > 1})
    if twice:
        raise SourceError(f"{path}: column {twice[0]} is there twice; keep one of them")
    if not rows:
        raise SourceError(f"{path} has columns but no rows; give a file with flows")
    return Layout(kind, tuple(columns))


def _demand(path: Path, must: list[str], columns: list[str], layout: str) -> None:
    missing = [name for name in must if name not in columns]
    if not missing:
        return
    spare = [name[:80] for name in columns if name not in must]
    near = {name: difflib.get_close_matches(name, spare, 1, 0.6) for name in missing}
    hints = [f"{name} (nearest found: {match[0]})" if match else name for name, match in near.items()]
    kind = NoFlowsError if len(missing) == len(must) and not any(near.values()) else SourceError
    raise kind(f"{path}: wrong columns for the {layout}: missing {', '.join(hints)}; rename or add them")
