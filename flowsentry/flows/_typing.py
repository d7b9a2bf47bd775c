"""From text to the canonical types, in DuckDB, a chunk at a time: every value is tried, a bad one gives a reason.

DuckDB only ever sees Arrow tables in memory: it has no access to files or the network and loads no extension. Paths
and values are never part of an SQL text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Final

import duckdb
import pyarrow as pa

from flowsentry.flows._layouts import PACKETBEAT, PUBLISHED, Layout
from flowsentry.flows.schema import BY_NAME, SCHEMA, TIME_DTYPE

MEMORY_LIMIT: Final = "1GB"
RAW_LENGTH: Final = 500
"""Characters of an offending record that are kept."""

_WHOLE: Final = r"[+-]?[0-9]+(\.0+)?"
_TIME: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?"
_QUOTED: Final = '(?:"(?:[^"]|"")*"|[^"{d}]*)'

_WHERE_READ: Final = ("recording", "file", "row")
_INTEGERS: Final = {"int64": "BIGINT", "Int64": "BIGINT", "Int32": "INTEGER"}
_KIND: Final = {"bool": "true or false", TIME_DTYPE: "a timestamp", **dict.fromkeys(_INTEGERS, "a whole number")}


def connect() -> Any:
    """A DuckDB connection in memory that cannot reach anything outside the tables given to it."""
    connection = duckdb.connect(
        config={
            "memory_limit": MEMORY_LIMIT,
            "threads": str(min(4, os.cpu_count() or 1)),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "enable_external_access": "false",
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET arrow_large_buffer_size = true")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET lock_configuration = true")
    return connection


def typed_columns(layout: Layout) -> list[str]:
    """Names of the canonical columns that a file of this layout gives, without those that say where it was read."""
    if layout.kind in ("published CSV", "published Parquet"):
        names = {ours for ours, theirs in PUBLISHED.items() if theirs in layout.columns} | {"label"}
    elif layout.kind == "Packetbeat NDJSON":
        names = set(PACKETBEAT)
    else:
        names = {column.name for column in SCHEMA if column.presence != "derived"} & set(layout.columns)
    return [column.name for column in SCHEMA if column.name in names and column.name not in _WHERE_READ]


class Typer:
    """Turns chunks of records of one layout into typed rows."""

    def __init__(self, connection: Any, layout: Layout) -> None:
        self._connection = connection
        self._names = typed_columns(layout)
        text = {
            "published CSV": _text_of_csv,
            "Packetbeat NDJSON": _text_of_packetbeat,
            "published Parquet": _text_of_parquet,
            "canonical Parquet": _text_of_parquet,
        }[layout.kind](layout, self._names)
        values = ", ".join(f"{_value(name)} AS {_quote(name)}" for name in self._names)
        cases = " ".join(f"WHEN {test} THEN '{reason}'" for test, reason in _problems(self._names))
        self._query = f"""
            WITH texts AS ({text}),
                 typed AS (SELECT "row", record, problem, {", ".join(f"x_{name}" for name in self._names)},
                                  {values} FROM texts)
            SELECT "row", {", ".join(_quote(name) for name in self._names)},
                   coalesce(problem, CASE {cases} END) AS reason,
                   CASE WHEN reason IS NOT NULL THEN left(CAST(record AS VARCHAR), {RAW_LENGTH}) END AS raw
            FROM typed"""

    def __call__(self, chunk: pa.Table) -> Iterator[pa.RecordBatch]:
        """Typed rows in the order of the chunk; `reason` is null for good ones.

        Args:
            chunk: `row` (int64) and either `record` (text of a line) or the columns of a Parquet file.
        """
        self._connection.register("chunk", chunk)
        try:
            yield from self._connection.sql(self._query).to_arrow_reader(1 << 17)
        finally:
            self._connection.unregister("chunk")


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _clean(text: str) -> str:
    return f"nullif({text}, '')"


def _text_of_csv(layout: Layout, names: list[str]) -> str:
    d = layout.delimiter
    field = _QUOTED.format(d=d)
    place = {name: layout.columns.index(PUBLISHED[name]) + 1 for name in names if PUBLISHED[name] in layout.columns}
    texts = ", ".join(
        f"{_clean(f'fields[{place[name]}]') if name in place else 'CAST(NULL AS VARCHAR)'} AS x_{name}"
        for name in names
    )
    return f"""
        SELECT "row", record, {texts},
               CASE WHEN torn THEN 'quotes are not closed'
                    WHEN len(fields) != {len(layout.columns)} THEN 'wrong number of fields' END AS problem
        FROM (SELECT *, CASE WHEN NOT contains(record, '"') THEN string_split(record, '{d}')
                             WHEN NOT torn THEN
                                  list_transform(regexp_extract_all('{d}' || record, '{d}({field})', 1),
                                                 lambda x: CASE WHEN x[1] = '"' THEN replace(x[2:-2], '""', '"')
                                                                ELSE x END) END AS fields
              FROM (SELECT "row", record,
                           contains(record, '"') AND NOT regexp_full_match('{d}' || record, '({d}{field})+') AS torn
                    FROM chunk WHERE record != ''))"""


def _text_of_packetbeat(layout: Layout, names: list[str]) -> str:
    paths: list[str] = []
    places: dict[str, list[int]] = {}
    for name, fields in PACKETBEAT.items():
        for field in fields:
            nested = "$." + ".".join(json.dumps(part) for part in field.split("."))
            for path in (nested, f"$.{json.dumps(field)}"):
                paths.append(path)
                places.setdefault(name, []).append(len(paths))
    x = {name: "coalesce(" + ", ".join(f"f[{i}]" for i in where) + ")" for name, where in places.items()}
    for name in ("src_ip", "dst_ip"):
        # A tunnelled flow lists the addresses of every layer, the innermost last.
        x[name] = f"CASE WHEN starts_with({x[name]}, '[') THEN {x[name]}->>'$[#-1]' ELSE {x[name]} END"
    for name in ("bytes", "packets"):
        ends = f"CAST(coalesce(TRY_CAST({x[f'src_{name}']} AS BIGINT), 0) + " + (
            f"coalesce(TRY_CAST({x[f'dst_{name}']} AS BIGINT), 0) AS VARCHAR)"
        )
        x[name] = f"coalesce({x[name]}, CASE WHEN {x[f'src_{name}']} IS NOT NULL OR {x[f'dst_{name}']} IS NOT NULL "
        x[name] += f"THEN {ends} END)"
    for end in ("src", "dst"):
        x[f"{end}_workload"] = f"concat_ws('/', {x[f'{end}_namespace']}, {x[f'{end}_workload']})"
    texts = ", ".join(f"{_clean(x[name])} AS x_{name}" for name in names)
    listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"""
        SELECT "row", record, {texts},
               CASE WHEN f IS NULL THEN 'not a JSON object'
                    WHEN {x["flow_id"]} IS NULL THEN 'not a flow event' END AS problem
        FROM (SELECT "row", record,
                     CASE WHEN json_valid(record) AND starts_with(trim(record), '{{')
                          THEN json_extract_string(record, [{listed}]) END AS f
              FROM chunk WHERE record != '')"""


def _text_of_parquet(layout: Layout, names: list[str]) -> str:
    theirs = PUBLISHED if layout.kind == "published Parquet" else {name: name for name in names}
    texts = []
    for name in names:
        if theirs[name] in layout.columns:
            text = _clean(f"CAST({_quote(theirs[name])} AS VARCHAR)")
            if BY_NAME[name].dtype in _INTEGERS:
                text = f"nullif({text}, 'nan')"
        else:
            text = "CAST(NULL AS VARCHAR)"
        texts.append(f"{text} AS x_{name}")
    record = (
        "struct_pack("
        + ", ".join(
            f"{_quote(column)} := {_quote(column)}"
            for column in dict.fromkeys(theirs[n] for n in names)
            if column in layout.columns
        )
        + ")"
    )
    return f'SELECT "row", to_json({record}) AS record, {", ".join(texts)}, CAST(NULL AS VARCHAR) AS problem FROM chunk'


def _value(name: str) -> str:
    dtype, x = BY_NAME[name].dtype, f"x_{name}"
    if name == "label":
        return f"CASE WHEN lower({x}) IN ('benign', '0', '0.0') THEN 'benign' " + (
            f"WHEN lower({x}) IN ('malicious', '1', '1.0') THEN 'malicious' END"
        )
    if dtype == "bool":
        return f"CASE WHEN lower({x}) IN ('true', '1') THEN true WHEN lower({x}) IN ('false', '0') THEN false END"
    if dtype in _INTEGERS:
        return f"CASE WHEN regexp_full_match({x}, '{_WHOLE}') THEN TRY_CAST({x} AS {_INTEGERS[dtype]}) END"
    if dtype == TIME_DTYPE:
        # Nanoseconds since 1970 must fit into 64 bits.
        parsed = f"CASE WHEN regexp_full_match({x}, '{_TIME}') THEN TRY_CAST({x} AS TIMESTAMPTZ) END"
        return f"CASE WHEN year({parsed}) BETWEEN 1970 AND 2261 THEN {parsed} END"
    return f"lower({x})" if name == "transport" else x


def _problems(names: list[str]) -> list[tuple[str, str]]:
    problems = []
    for name in names:
        dtype = BY_NAME[name].dtype
        kind = _KIND.get(dtype, "benign or malicious")
        if name == "flow_id":
            problems.append(("x_flow_id IS NULL", "flow_id is missing"))
        elif dtype in ("bool", "int64") or name == "time":
            problems.append((f"x_{name} IS NULL", f"{name} is missing"))
        if dtype in _KIND or name == "label":
            problems.append((f"x_{name} IS NOT NULL AND {_quote(name)} IS NULL", f"{name} is not {kind}"))
    return problems
