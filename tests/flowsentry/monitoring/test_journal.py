from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flowsentry.errors import ConfigError, StoreError
from flowsentry.monitoring import journal as journals
from flowsentry.monitoring.journal import COLUMNS, NARROW, Announced, Header, Journal, Model, Reader, to_table

HEADER = Header("replay-1", "flows.csv", "ab" * 32, 1000, "max", "http://127.0.0.1:1", 1.5e9)


def row(position: int, **changed: Any) -> dict[str, Any]:
    values = {
        "position": position,
        "flow": position,
        "flow_id": f"id {position}",
        "time": 1_700_000_000_000 + position,
        "src_ip": "10.0.0.1",
        "dst_ip": "10.0.0.2",
        "src_port": None,
        "dst_port": 22,
        "transport": "tcp",
        "expected": "malicious",
        "family": "flood",
        "verdict": "malicious",
        "rejected": None,
        "anomaly_score": 4.25,
        "threshold": 3.0,
        "warm": True,
        "anomaly_type": "flood",
        "reason": "900 flows in 10 s",
        "request": position,
        "latency_ms": 2.5,
        "sent": 1_800_000_000_000 + position,
    }
    assert set(values) == set(COLUMNS)
    return values | changed


def test_what_is_noted_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.replay"
    with Journal.create(path, HEADER) as journal:
        journal.add_model(Model(0, "7", {"card": {"format": 1}}))
        journal.add([row(0), row(1, verdict=None, rejected="src_port: not a number", warm=None, anomaly_score=None)])
        assert (journal.count, journal.finished) == (2, None)
        journal.finish()
    table = to_table(path)
    assert table.columns.tolist() == list(COLUMNS)
    first = table.iloc[0]
    assert (first["anomaly_score"], first["dst_port"], first["reason"]) == (4.25, 22, "900 flows in 10 s")
    assert pd.isna(first["src_port"])
    assert first["time"] == pd.Timestamp(1_700_000_000_000, unit="ms", tz="UTC")
    assert table["warm"].tolist() == [True, pd.NA]
    assert table["rejected"].tolist() == [None, "src_port: not a number"]
    with Reader(path) as reader:
        assert reader.header == HEADER
        assert reader.models == [Model(0, "7", {"card": {"format": 1}})]
        assert reader.finished is not None
        assert reader.finished > HEADER.begun


def test_a_reader_asks_for_what_is_new_alone_while_the_writer_is_at_work(tmp_path: Path) -> None:
    path = tmp_path / "a.replay"
    with Journal.create(path, HEADER) as journal, Reader(path) as reader:
        assert reader.read().empty
        journal.add([row(i) for i in range(5)])
        assert reader.read(columns=NARROW)["position"].tolist() == [0, 1, 2, 3, 4]
        journal.add([row(5, verdict="benign"), row(6)])
        assert reader.read(4)["position"].tolist() == [5, 6]
        assert reader.read(1, limit=2)["position"].tolist() == [2, 3]
        assert reader.alerts(3)["position"].tolist() == [6, 4, 3]


def test_a_reader_in_the_middle_of_reading_neither_blocks_the_writer_nor_sees_half_a_request(tmp_path: Path) -> None:
    path = tmp_path / "a.replay"
    with Journal.create(path, HEADER) as journal, Reader(path) as reader:
        sizes = set()
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                sizes.add(len(reader.read()))

        thread = threading.Thread(target=watch)
        thread.start()
        for first in range(0, 700, 7):
            journal.add([row(i) for i in range(first, first + 7)])
        done.set()
        thread.join()
        assert journal.count == 700
        assert {size % 7 for size in sizes} == {0}


def test_a_report_cannot_have_two_verdicts(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "a.replay", HEADER) as journal:
        journal.add([row(0)])
        with pytest.raises(Exception, match="UNIQUE"):
            journal.add([row(1), row(0, verdict="benign")])
        assert journal.count == 1


WRITER = """
import sys
from pathlib import Path
from flowsentry.monitoring.journal import Announced, Journal
sys.path.insert(0, sys.argv[2])
from tests.flowsentry.monitoring.test_journal import HEADER, row
journal = Journal.create(Path(sys.argv[1]), HEADER)
first = 0
while True:
    journal.announce(Announced(first, 10))
    journal.add([row(i) for i in range(first, first + 10)])
    first += 10
    if first == 200:
        journal.announce(Announced(first, 10))
        print("written", flush=True)
        sys.stdin.readline()
"""


def test_a_killed_writer_leaves_all_whole_requests_and_the_one_it_was_about_to_send(tmp_path: Path) -> None:
    path = tmp_path / "a.replay"
    root = Path(__file__).resolve().parents[3]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(root)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        with pytest.raises(ConfigError, match="at work in another process"):
            Journal.resume(path)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with Journal.resume(path) as journal:
        assert journal.count == 200
        assert journal.announced == Announced(200, 10)
        journal.add([row(i) for i in range(200, 210)])
        assert journal.announced is None
    assert to_table(path)["position"].tolist() == list(range(210))


def test_others_cannot_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSENTRY_HOME", str(tmp_path / "home"))
    place = journals.folder()
    assert place == tmp_path / "home" / "replays"
    assert place.stat().st_mode & 0o777 == 0o700
    with Journal.create(place / "a.replay", HEADER) as journal:
        journal.add([row(0)])
        assert {file.stat().st_mode & 0o777 for file in place.iterdir()} == {0o600}


def test_the_newest_journal_comes_first(tmp_path: Path) -> None:
    for name in ("20260101T000000-b", "20260301T000000-a", "20260201T000000-c"):
        Journal.create(tmp_path / f"{name}.replay", HEADER).close()
    assert [path.stem[:6] for path in journals.journals(tmp_path)] == ["202603", "202602", "202601"]


def test_a_file_that_is_no_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.replay"
    wrong.write_bytes(os.urandom(9000))
    empty = tmp_path / "empty.replay"
    empty.touch()
    for path in (wrong, empty):
        with pytest.raises(StoreError, match=path.name):
            Reader(path)
        with pytest.raises(StoreError, match=path.name):
            Journal.resume(path)
    with pytest.raises(StoreError, match="no such replay"):
        Reader(tmp_path / "none.replay")
    with pytest.raises(ConfigError, match="no such replay"):
        Journal.resume(tmp_path / "none.replay")
    with pytest.raises(ConfigError, match=r"wrong\.replay"):
        Journal.create(wrong, HEADER)
