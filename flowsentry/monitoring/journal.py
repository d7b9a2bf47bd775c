"""The journal of a replay: what was expected of every report, and what the live service said.

One SQLite file a replay, with a write-ahead log: what is committed survives `kill -9` of the writer, readers see
whole requests only, are never blocked and never block, and ask for what is new by position. A line-based file would
need all of that written by hand. Position is the primary key: a report cannot have two verdicts.

A request is announced before it is sent. A replay that was killed in between sends the same request again, and the
service repeats its first answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pandas as pd

from flowsentry.errors import ConfigError, StoreError
from flowsentry.serving.deployer import HOME, home

SUFFIX: Final = ".replay"
FORMAT: Final = 1
COLUMNS: Final = {
    "position": "INTEGER PRIMARY KEY",
    "flow": "INTEGER NOT NULL",
    "flow_id": "TEXT NOT NULL",
    "time": "INTEGER NOT NULL",
    "src_ip": "TEXT",
    "dst_ip": "TEXT",
    "src_port": "INTEGER",
    "dst_port": "INTEGER",
    "transport": "TEXT",
    "expected": "TEXT",
    "family": "TEXT",
    "verdict": "TEXT",
    "rejected": "TEXT",
    "anomaly_score": "REAL",
    "threshold": "REAL",
    "warm": "INTEGER",
    "anomaly_type": "TEXT",
    "reason": "TEXT",
    "request": "INTEGER NOT NULL",
    "latency_ms": "REAL NOT NULL",
    "sent": "INTEGER NOT NULL",
}
"""Of the table of reports. `position`: in the replayed flows, from 0. `flow`: number of the flow. `time` and `sent`: ms
since 1970. `expected`, `family`: truth, missing if unknown. `verdict`: benign or malicious, missing if `rejected` says
why. `reason`: text of the first one. `request`: position of the first report of its request, `latency_ms` that
request's."""
NARROW: Final = ("position", "flow", "expected", "family", "verdict", "warm", "request", "latency_ms", "sent")
"""What the figures need."""

_DTYPES: Final = {
    "position": "int64",
    "flow": "int64",
    "time": "datetime64[ms, UTC]",
    "src_port": "Int32",
    "dst_port": "Int32",
    "anomaly_score": "float64",
    "threshold": "float64",
    "warm": "boolean",
    "request": "int64",
    "latency_ms": "float64",
    "sent": "datetime64[ms, UTC]",
}
_CHUNK: Final = 20_000
_SCHEMA: Final = (
    "CREATE TABLE header (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    f"CREATE TABLE report ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())})",
    "CREATE INDEX alert ON report (position) WHERE verdict = 'malicious'",
    "CREATE TABLE request (first INTEGER PRIMARY KEY, count INTEGER NOT NULL)",
    "CREATE TABLE model (position INTEGER PRIMARY KEY, version TEXT NOT NULL, description TEXT NOT NULL)",
)


@dataclass(frozen=True)
class Header:
    """What is replayed, and how."""

    stream: str
    """Name of its stream at the service."""
    source: str
    """For people: which flows."""
    digest: str
    """SHA-256 (hex) of the replayed flows."""
    total: int
    """Reports to send."""
    pace: str
    endpoint: str
    begun: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Model:
    """A model that answered, from a position on."""

    position: int
    version: str
    description: dict[str, Any]
    """What the service says of it at /v1/model."""


@dataclass(frozen=True)
class Announced:
    """A request that was sent, or was about to be."""

    first: int
    count: int


def folder() -> Path:
    """Where replays are kept: FLOWSENTRY_HOME/replays; made for this user alone if missing."""
    path = home() / "replays"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: replays cannot be kept there ({error.strerror}); set {HOME}") from error
    return path


def journals(place: Path) -> list[Path]:
    """The journals of a folder, the one begun last first: names begin with the time."""
    return sorted(place.glob(f"*{SUFFIX}"), key=lambda path: path.name, reverse=True)


class _Connected:
    """An open journal."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        with _understood(path):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            stored = dict(connection.execute("SELECT key, value FROM header")) if version == FORMAT else {}
        try:
            self.header = Header(**json.loads(stored["header"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path}: not a replay's journal of format {FORMAT}; delete it") from error

    @property
    def finished(self) -> float | None:
        """When the last report was answered, in seconds since 1970; None before that."""
        with _understood(self.path):
            row = self._connection.execute("SELECT value FROM header WHERE key = 'finished'").fetchone()
        return float(row[0]) if row else None

    @property
    def count(self) -> int:
        """Reports answered; also the position of the next one."""
        with _understood(self.path):
            (last,) = self._connection.execute("SELECT max(position) FROM report").fetchone()
        return 0 if last is None else int(last) + 1

    @property
    def models(self) -> list[Model]:
        """The models that answered, in order."""
        with _understood(self.path):
            rows = self._connection.execute("SELECT position, version, description FROM model ORDER BY position")
            return [Model(position, version, json.loads(text)) for position, version, text in rows]

    def close(self) -> None:
        """End the use of the file."""
        self._connection.close()


class Journal(_Connected):
    """The one writer of a journal."""

    def __init__(self, path: Path, *, lock: int) -> None:
        self._lock = lock
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            super().__init__(path, connection)
        except BaseException:
            connection.close()
            os.close(lock)
            raise

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Begin a journal, readable by this user alone.

        Raises:
            ConfigError: the file is there already or cannot be written.
        """
        lock = _locked(path)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            os.close(lock)
            raise ConfigError(f"{path}: no replay can be kept there ({error.strerror}); name another file") from error
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO header VALUES ('header', ?)", (json.dumps(vars(header)),))
                connection.execute(f"PRAGMA user_version = {FORMAT}")
        finally:
            connection.close()
        return cls(path, lock=lock)

    @classmethod
    def resume(cls, path: Path) -> Journal:
        """Go on with a journal whose writer has ended.

        Raises:
            ConfigError: there is no such file, or its replay is at work.
            StoreError: it is no journal, or of another format.
        """
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such replay")
        lock = _locked(path)
        try:
            return cls(path, lock=lock)
        except sqlite3.DatabaseError as error:
            raise _damaged(path, error) from error

    @property
    def announced(self) -> Announced | None:
        """The request that was announced and has no answer in the journal."""
        row = self._connection.execute(
            "SELECT first, count FROM request WHERE first >= ? ORDER BY first DESC LIMIT 1", (self.count,)
        ).fetchone()
        return Announced(*row) if row else None

    def announce(self, request: Announced) -> None:
        """Note a request before it is sent."""
        self._connection.execute("INSERT OR REPLACE INTO request VALUES (?, ?)", (request.first, request.count))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the answers of a request, all or none of them; keys as in `COLUMNS`."""
        statement = f"INSERT INTO report VALUES ({', '.join(f':{name}' for name in COLUMNS)})"
        with _transaction(self._connection):
            self._connection.executemany(statement, rows)

    def add_model(self, model: Model) -> None:
        """Note that another model answers from a position on."""
        self._connection.execute(
            "INSERT OR REPLACE INTO model VALUES (?, ?, ?)",
            (model.position, model.version, json.dumps(model.description)),
        )

    def finish(self) -> None:
        """Note that nothing is left to send."""
        self._connection.execute("INSERT OR REPLACE INTO header VALUES ('finished', ?)", (repr(time.time()),))

    def close(self) -> None:
        super().close()
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reader(_Connected):
    """One of any number of readers; the journal may grow meanwhile."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StoreError(f"{path}: there is no such replay")
        # the page's server asks from threads of its own, one at a time
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        try:
            super().__init__(path, connection)
        except BaseException:
            connection.close()
            raise

    def read(self, after: int = -1, *, columns: Sequence[str] = tuple(COLUMNS), limit: int = _CHUNK) -> pd.DataFrame:
        """The next reports, in order of position.

        Args:
            after: position of the last report known; -1 reads from the first.
            columns: of `COLUMNS`.
            limit: most rows.
        """
        query = f"SELECT {', '.join(columns)} FROM report WHERE position > ? ORDER BY position LIMIT ?"
        return self._table(columns, query, (after, limit))

    def alerts(self, limit: int) -> pd.DataFrame:
        """The last reports called malicious, the newest first."""
        names = ", ".join(COLUMNS)
        query = f"SELECT {names} FROM report WHERE verdict = 'malicious' ORDER BY position DESC LIMIT ?"
        return self._table(tuple(COLUMNS), query, (limit,))

    def _table(self, columns: Sequence[str], query: str, values: tuple[int, ...]) -> pd.DataFrame:
        with _understood(self.path):
            rows = self._connection.execute(query, values).fetchall()
        data = list(zip(*rows, strict=True)) or [()] * len(columns)
        return pd.DataFrame(
            {name: _series(name, values) for name, values in zip(columns, data, strict=True)}, copy=False
        )

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_table(path: Path) -> pd.DataFrame:
    """All of a journal, one row a report with the columns of `COLUMNS`: what a replay leaves behind.

    Raises:
        StoreError: there is no journal, or it is damaged.
    """
    with Reader(path) as reader:
        parts = [reader.read()]
        while len(parts[-1]) == _CHUNK:
            parts.append(reader.read(int(parts[-1]["position"].iloc[-1])))
    return pd.concat(parts, ignore_index=True)


def _series(name: str, values: tuple[Any, ...]) -> pd.Series:
    dtype: Any = _DTYPES.get(name, "object")
    if dtype.startswith("datetime64"):
        return pd.Series(np.array(values, "datetime64[ms]")).dt.tz_localize("UTC")
    if dtype == "boolean":
        return pd.Series([None if value is None else bool(value) for value in values], dtype=dtype)
    return pd.Series(values, dtype=dtype)


def _locked(path: Path) -> int:
    """Hold the journal's lock until the descriptor is closed; also `kill -9` closes it."""
    try:
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: no replay can be kept there ({error.strerror}); name another file") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError(f"{path}: this replay is at work in another process") from error
    return lock


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: not a replay's journal, or a damaged one ({error})")
