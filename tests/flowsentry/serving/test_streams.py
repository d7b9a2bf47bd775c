from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pandas as pd
import pytest

from flowsentry.detector import Detector
from flowsentry.errors import StoreError
from flowsentry.features import behaviour, paper
from flowsentry.serving.client import as_rows, encode
from flowsentry.serving.protocol import NDJSON, SeenMismatch
from flowsentry.serving.store import open_store
from flowsentry.serving.streams import Limits, Position, StreamBusy, Streams, TooManyStreams
from tests.flowsentry.serving.local_service import ListStore, View, ask, offline, post, scores
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

SELDOM = Limits(checkpoint_flows=1 << 40, checkpoint_seconds=1e6)
"""A checkpoint is written only when asked for."""
PATH = f"behaviour-{behaviour.VERSION}/s.state"

Begin = Callable[..., Streams]


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small)


@pytest.fixture(scope="module")
def reports(small: Small) -> pd.DataFrame:
    return small.raw


@pytest.fixture(scope="module")
def expected(detector: Detector, reports: pd.DataFrame) -> list[tuple[Any, ...]]:
    verdicts = offline(detector, reports)
    assert len({verdict[2] for verdict in verdicts}) == len({verdict[3] for verdict in verdicts}) == 2
    return verdicts


@pytest.fixture
def begin(detector: Detector) -> Iterator[Begin]:
    """Starts services; a store that fails at the end does not matter."""
    started: list[Streams] = []

    def start(store: Any, limits: Limits = SELDOM, of: Detector = detector) -> Streams:
        started.append(Streams(of, store, limits))
        return started[-1]

    yield start
    for streams in started:
        streams.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


@pytest.mark.parametrize("size", [1, 700, 4000])
def test_batches_get_the_offline_verdicts(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]], size: int
) -> None:
    streams = begin(ListStore())
    part = reports if size > 1 else reports.iloc[:300]
    got = []
    for i in range(0, len(part), size):
        taken = ask(streams, part.iloc[i : i + size], seen=i)
        assert taken.seen == min(i + size, len(part))
        got += scores(taken)
    assert got == expected[: len(part)]


def test_another_position_is_refused_and_changes_nothing(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    with pytest.raises(SeenMismatch) as unknown:
        ask(streams, reports.iloc[:5], seen=100)
    assert (unknown.value.seen, unknown.value.durable) == (0, 0)
    ask(streams, reports.iloc[:5], seen=0)
    for wrong in (0, 4, 6):
        with pytest.raises(SeenMismatch) as known:
            ask(streams, reports.iloc[5:7], seen=wrong)
        assert known.value.seen == 5
    assert ask(streams, reports.iloc[5:7], seen=5).seen == 7
    assert ask(streams, reports.iloc[7:9]).seen == 9  # without a position it goes on


def test_the_last_request_again_gets_its_first_answer_and_no_other_does(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    ask(streams, reports.iloc[:5], seen=0)
    first = ask(streams, reports.iloc[5:9], seen=5)
    again = ask(streams, reports.iloc[5:9], seen=5)
    assert (again.answer, again.seen, again.repeated, again.judged) == (first.answer, 9, True, None)
    assert not first.repeated and first.judged is not None and len(first.judged) == 4
    assert streams.counters.repeated_requests == 1
    for part, seen, absorb in (
        (slice(5, 8), 5, False),
        (slice(6, 10), 5, False),
        (slice(5, 9), 5, True),
        (slice(0, 5), 0, False),
    ):
        with pytest.raises(SeenMismatch):
            ask(streams, reports.iloc[part], seen=seen, absorb=absorb)


def test_absorbed_flows_change_the_state_and_get_no_verdict(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    streams = begin(ListStore())
    absorbed = ask(streams, reports.iloc[:2000], seen=0, absorb=True)
    assert scores(absorbed) == [] and absorbed.judged is None
    assert streams.counters.resent_flows == 2000
    assert scores(ask(streams, reports.iloc[2000:], seen=2000)) == expected[2000:]


def test_a_rejected_flow_keeps_its_place(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    rows = as_rows(reports.iloc[:6])
    rows[1]["bytes"] = -1
    taken = ask(streams, rows, seen=0)
    answer = orjson.loads(taken.answer)
    assert [verdict["index"] for verdict in answer["verdicts"]] == [0, 2, 3, 4, 5]
    assert [reject["index"] for reject in answer["rejected"]] == [1]
    only_bad = [dict(rows[1], bytes=-2)]
    assert taken.seen == 6 and ask(streams, only_bad, seen=6).seen == 7
    streams.checkpoint()
    assert streams.status("s") == Position("s", 7, 7, False)


def test_no_flows_change_nothing(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    first = ask(streams, reports.iloc[:5], seen=0)
    assert ask(streams, [], seen=5).seen == 5
    assert ask(streams, reports.iloc[:5], seen=0).answer == first.answer


def test_a_stream_begun_anew_knows_nothing_from_before(begin: Begin, detector: Detector, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store)
    ask(streams, reports.iloc[:3000], seen=0)
    rest = reports.iloc[2900:]
    taken = ask(streams, rest, seen=50, anew=True)
    assert taken.seen == 50 + len(rest) and taken.durable == 50
    assert scores(taken) == offline(detector, rest)
    assert ask(streams, rest, seen=50, anew=True).repeated


def test_what_a_stream_was_does_not_come_back_after_it_began_anew(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(first := View(store))
    ask(streams, reports.iloc[:900], seen=0)
    streams.checkpoint()
    ask(streams, reports.iloc[:10], seen=0, anew=True)
    first.is_cut = True  # killed before its next checkpoint
    with pytest.raises(SeenMismatch) as elsewhere:
        ask(begin(store), reports.iloc[10:20], seen=10)
    assert elsewhere.value.seen == 0


def test_a_second_request_of_a_stream_is_refused_while_the_first_runs(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    ask(streams, reports.iloc[:5], seen=0)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, streams, reports.iloc[5:9], seen=5, before_answer=hold)
        assert entered.wait(10)
        assert not streams.is_open("s")
        with pytest.raises(StreamBusy):
            ask(streams, reports.iloc[9:12], seen=9)
        with pytest.raises(StreamBusy):
            streams.forget("s")
        assert ask(streams, reports.iloc[:5], stream="other", seen=0).seen == 5  # others go on
        leave.set()
        assert running.result().seen == 9
    assert streams.is_open("s")
    assert ask(streams, reports.iloc[9:12], seen=9).seen == 12


def test_sixteen_streams_side_by_side_do_not_touch_each_other(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    streams = begin(ListStore(), Limits(streams=20, checkpoint_flows=300, checkpoint_seconds=0.05))

    def follow(number: int) -> list[tuple[Any, ...]]:
        got = []
        size = 37 + number
        for i in range(0, 1000, size):
            got += scores(ask(streams, reports.iloc[i : min(i + size, 1000)], stream=f"s{number}", seen=i))
        return got

    with ThreadPoolExecutor(16) as pool:
        for got in pool.map(follow, range(16)):
            assert got == expected[:1000]
    assert len(streams) == 16
    assert streams.counters.checkpoints > 0


def test_a_restart_from_a_checkpoint_changes_no_bit_of_what_follows(
    begin: Begin, reports: pd.DataFrame, tmp_path: Path
) -> None:
    without = begin(ListStore())
    ask(without, reports.iloc[:2500], seen=0)
    streams = begin(open_store(tmp_path))
    ask(streams, reports.iloc[:2500], seen=0)
    streams.close()
    restarted = begin(open_store(tmp_path))
    assert not restarted.is_open("s")
    rest = ask(restarted, reports.iloc[2500:], seen=2500)
    assert orjson.loads(rest.answer) | {"durable": 0} == orjson.loads(
        ask(without, reports.iloc[2500:], seen=2500).answer
    )
    assert rest.durable == 2500


def test_a_lost_answer_is_given_again_after_a_restart(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store)
    ask(streams, reports.iloc[:2000], seen=0)
    lost = ask(streams, reports.iloc[2000:2600], seen=2000)
    streams.close()
    again = ask(begin(store), reports.iloc[2000:2600], seen=2000)
    assert again.repeated and again.answer == lost.answer and again.seen == 2600


@pytest.mark.parametrize("anew", [False, True])
def test_another_detector_repeats_a_lost_answer_but_judges_a_stream_begun_anew(
    begin: Begin, small: Small, reports: pd.DataFrame, anew: bool
) -> None:
    store = ListStore()
    before = begin(store)
    first = ask(before, reports.iloc[:600], seen=0, anew=anew)
    assert ask(before, reports.iloc[:600], seen=0, anew=anew).repeated
    before.release()
    other = trained(small, family="logistic_regression")
    again = ask(begin(store, of=other), reports.iloc[:600], seen=0, anew=anew)
    assert again.repeated is not anew and again.seen == 600
    assert (again.answer == first.answer) is not anew
    if anew:
        assert scores(again) == offline(other, reports.iloc[:600])


def test_an_empty_answer_survives_a_restart(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    before = begin(store)
    lines = encode(reports.iloc[:50], NDJSON)
    given: dict[str, Any] = {"media_type": NDJSON, "stream": "s", "seen": 0, "absorb": True, "anew": False}
    assert post(before, lines, **given).answer == b""
    before.close()
    again = post(begin(store), lines, **given)
    assert again.repeated and again.answer == b""


SERVICE = """
import sys
from pathlib import Path
import pandas as pd
from flowsentry.detector import Detector
from flowsentry.serving.store import open_store
from flowsentry.serving.streams import Limits, Streams
from tests.flowsentry.serving.local_service import ask
detector, state, reports = Detector.load(Path(sys.argv[1])), sys.argv[2], pd.read_parquet(sys.argv[3])
streams = Streams(detector, open_store(state), Limits(checkpoint_flows=1, checkpoint_seconds=0.001))
for i in range(0, len(reports), 5):
    print(ask(streams, reports.iloc[i : i + 5], seen=i).durable, flush=True)
"""


def test_a_killed_service_remembers_what_it_called_durable(
    begin: Begin, detector: Detector, reports: pd.DataFrame, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    detector.save(tmp_path / "detector")
    reports.to_parquet(tmp_path / "reports.parquet")
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE, *(str(tmp_path / name) for name in ("detector", "state", "reports.parquet"))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert service.stdout is not None
    for line in service.stdout:
        if int(line) > 800:
            break
    service.kill()
    durable = max([int(line), *(int(more) for more in service.stdout if more.endswith("\n"))])
    service.wait()
    service.stdout.close()
    streams = begin(open_store(tmp_path / "state"))
    position = streams.status("s")
    assert position is not None and durable <= position.seen < len(reports)
    assert scores(ask(streams, reports.iloc[position.seen :], seen=position.seen)) == expected[position.seen :]


@pytest.mark.parametrize(
    "limits", [Limits(checkpoint_flows=50, checkpoint_seconds=1e6), Limits(checkpoint_seconds=0.05)]
)
def test_a_stream_is_written_after_some_flows_or_some_time(begin: Begin, reports: pd.DataFrame, limits: Limits) -> None:
    store = ListStore()
    streams = begin(store, limits)
    assert ask(streams, reports.iloc[:60], seen=0).durable == 0
    wait_for(lambda: PATH in store.contents)
    wait_for(lambda: ask(streams, [], seen=60).durable == 60)
    assert streams.counters.checkpoints == 1
    assert streams.counters.checkpoint_seconds > 0


def test_a_stream_is_not_written_before_it_is_due(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store, Limits(checkpoint_flows=50, checkpoint_seconds=1e6))
    ask(streams, reports.iloc[:49], seen=0)
    time.sleep(0.1)
    assert not store.contents


def test_a_failing_store_fails_no_request_and_what_is_durable_stays_behind(
    begin: Begin, reports: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    store = ListStore()
    streams = begin(store, Limits(checkpoint_flows=10, checkpoint_seconds=0.02))
    ask(streams, reports.iloc[:20], seen=0)
    wait_for(lambda: ask(streams, [], seen=20).durable == 20)
    store.is_down = True
    with caplog.at_level(logging.WARNING):
        ask(streams, reports.iloc[20:60], seen=20)
        wait_for(lambda: streams.counters.checkpoint_failures > 2)
    assert ask(streams, reports.iloc[60:80], seen=60).durable == 20
    assert len([record for record in caplog.records if "durable stays at 20" in record.getMessage()]) == 1
    store.is_down = False
    wait_for(lambda: ask(streams, [], seen=80).durable == 80)


def test_a_stream_is_not_opened_while_the_store_does_not_say_what_it_was(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    store.is_down = True
    streams = begin(store)
    for _ in range(2):
        with pytest.raises(StoreError, match="down"):
            ask(streams, reports.iloc[100:110])
    with pytest.raises(StoreError, match="down"):
        streams.status("s")
    assert len(streams) == 0
    store.is_down = False
    assert ask(streams, reports.iloc[100:110], seen=100).seen == 110


def test_the_oldest_idle_stream_makes_room_and_comes_back_as_it_was(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    streams = begin(ListStore(), Limits(streams=2, checkpoint_flows=1 << 40, checkpoint_seconds=1e6))
    got: dict[str, list[tuple[Any, ...]]] = {name: [] for name in "abc"}
    for i in range(0, 600, 200):
        for name in got:
            got[name] += scores(ask(streams, reports.iloc[i : i + 200], stream=name, seen=i))
            assert len(streams) <= 2 and streams.is_open(name)
    assert all(verdicts == expected[:600] for verdicts in got.values())
    assert streams.counters.evictions == 7


class Slow(ListStore):
    """Writes only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.writing, self.go = threading.Event(), threading.Event()

    def write(self, name: str, content: bytes) -> None:
        self.writing.set()
        assert self.go.wait(10)
        super().write(name, content)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_request_waits_while_its_stream_is_being_dropped(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]], is_lost: bool
) -> None:
    store = Slow()
    streams = begin(store, Limits(streams=2, checkpoint_flows=1 << 40, checkpoint_seconds=1e6))
    ask(streams, reports.iloc[:20], seen=0)
    ask(streams, reports.iloc[:5], stream="second", seen=0)
    with ThreadPoolExecutor(2) as pool:
        makes_room = pool.submit(ask, streams, reports.iloc[:5], stream="other", seen=0)
        assert store.writing.wait(10)
        assert not streams.is_open("s")
        waits = pool.submit(ask, streams, reports.iloc[20:40], seen=20)
        time.sleep(0.05)
        assert not waits.done()
        store.is_down = is_lost
        store.go.set()
        wait_for(makes_room.done)
        wait_for(waits.done)
        store.is_down = False
    assert (makes_room.exception() is not None) is is_lost
    assert scores(waits.result()) == expected[20:40]


def test_a_request_waits_while_its_stream_is_released_but_not_for_long(begin: Begin, reports: pd.DataFrame) -> None:
    store = Slow()
    streams = begin(store)
    ask(streams, reports.iloc[:20], seen=0)
    with ThreadPoolExecutor(1) as pool:
        releasing = pool.submit(streams.release)
        assert store.writing.wait(10)
        begun = time.monotonic()
        with pytest.raises(StreamBusy):
            ask(streams, reports.iloc[20:40], seen=20)
        assert 0.5 < time.monotonic() - begun < 5
        store.go.set()
        assert releasing.result() == 1
    assert ask(streams, reports.iloc[20:40], seen=20).seen == 40


def test_the_one_used_last_stays(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore(), Limits(streams=2))
    for name in ("a", "b", "a", "c"):
        ask(streams, reports.iloc[:1], stream=name)
    assert [streams.is_open(name) for name in "abc"] == [True, False, True]


def test_a_stream_that_cannot_be_written_is_kept(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store, Limits(streams=2, checkpoint_flows=1 << 40, checkpoint_seconds=1e6))
    for name in ("a", "b"):
        ask(streams, reports.iloc[:10], stream=name, seen=0)
    store.is_down = True
    with pytest.raises(TooManyStreams):
        ask(streams, reports.iloc[:10], stream="c", seen=0)
    for name in ("a", "b"):
        assert ask(streams, reports.iloc[10:20], stream=name, seen=10).seen == 20
    store.is_down = False
    assert ask(streams, reports.iloc[:10], stream="c", seen=0).seen == 10


def test_no_stream_is_dropped_during_its_request(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore(), Limits(streams=1))
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, streams, reports.iloc[:9], stream="a", seen=0, before_answer=hold)
        assert entered.wait(10)
        with pytest.raises(TooManyStreams):
            ask(streams, reports.iloc[:5], stream="b", seen=0)
        leave.set()
        running.result()
    assert ask(streams, reports.iloc[:5], stream="b", seen=0).seen == 5


def test_memory_is_bounded(begin: Begin, reports: pd.DataFrame) -> None:
    one = begin(ListStore())
    ask(one, reports.iloc[:100])
    most = int(one.nbytes * 3.5)
    streams = begin(ListStore(), Limits(memory_bytes=most, checkpoint_flows=1 << 40, checkpoint_seconds=1e6))
    for number in range(8):
        ask(streams, reports.iloc[:100], stream=f"s{number}", seen=0)
        assert streams.nbytes <= most
    assert len(streams) == 3
    assert streams.counters.evictions == 5
    assert ask(streams, reports.iloc[100:120], stream="s0", seen=100).seen == 120


def test_a_stream_that_grows_makes_others_go(begin: Begin, reports: pd.DataFrame) -> None:
    one = begin(ListStore())
    ask(one, reports.iloc[:10])
    answer = len(ask(one, reports).answer)
    streams = begin(ListStore(), Limits(memory_bytes=2 * one.nbytes - answer // 2, checkpoint_seconds=0.1))
    ask(streams, reports.iloc[:10], stream="a")
    ask(streams, reports.iloc[:10], stream="b")
    assert len(streams) == 2
    ask(streams, reports.iloc[10:], stream="b")
    ask(streams, reports.iloc[10:], stream="a")
    wait_for(lambda: len(streams) == 1)
    assert streams.is_open("a")


def test_a_stale_service_does_not_undo_what_another_one_wrote(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    store = ListStore()
    stale, other = begin(store), begin(store)
    ask(stale, reports.iloc[:500], seen=0)
    stale.checkpoint()
    ask(other, reports.iloc[500:2500], seen=500)
    other.checkpoint()
    ask(stale, reports.iloc[500:510], seen=500)
    stale.checkpoint()
    assert stale.counters.fenced == 1 and "another service went further" in caplog.text
    third = begin(store).status("s")
    assert third is not None and third.seen == 2500
    assert scores(ask(stale, reports.iloc[2500:], seen=2500)) == expected[2500:]


def test_a_service_that_is_behind_looks_at_the_store_before_it_says_so(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    store = ListStore()
    behind, other = begin(store), begin(store)
    ask(behind, reports.iloc[:500], seen=0)
    behind.checkpoint()
    lost = ask(other, reports.iloc[500:2500], seen=500)
    other.checkpoint()
    assert scores(ask(behind, reports.iloc[2500:], seen=2500)) == expected[2500:]
    late = begin(store)
    assert ask(late, reports.iloc[500:2500], seen=500).answer == lost.answer


def test_a_stream_begun_anew_replaces_one_that_went_further(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    old, other = begin(store), begin(store)
    ask(old, reports.iloc[:500], seen=0)
    old.checkpoint()
    ask(other, reports.iloc[:20], seen=0, anew=True)
    other.checkpoint()
    ask(old, reports.iloc[500:600], seen=500)
    old.checkpoint()
    position = begin(store).status("s")
    assert position is not None and position.seen == 20


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda content: b"",
        "not ours": lambda content: b"PK\3\4" + content,
        "cut in the header": lambda content: content[:80],
        "cut in the state": lambda content: content[:-2000],
        "a changed byte": lambda content: content[:-3000] + bytes([content[-3000] ^ 1]) + content[-2999:],
        "another seen": lambda content: content.replace(b'"seen": 100', b'"seen": 900'),
        "a negative length": lambda content: content.replace(b'"state_bytes": ', b'"state_bytes": -'),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_checkpoint_is_set_aside_and_the_stream_begins_anew(
    begin: Begin,
    detector: Detector,
    reports: pd.DataFrame,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    damaged = damages()[damage](store.contents[PATH])
    assert damaged != store.contents[PATH]
    store.contents[PATH] = damaged
    streams = begin(store)
    with pytest.raises(SeenMismatch) as elsewhere:
        ask(streams, reports.iloc[100:110], seen=100)
    assert elsewhere.value.seen == 0
    assert store.contents == {f"{PATH}.damaged": damaged}
    assert streams.counters.set_aside == 1 and "set aside" in caplog.text
    assert scores(ask(streams, reports.iloc[:300], seen=0)) == offline(detector, reports.iloc[:300])


def wrong_headers() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Headers that nobody wrote, by what is wrong with them."""
    return {
        "no warm": lambda header: {name: value for name, value in header.items() if name != "warm"},
        "warm is text": lambda header: header | {"warm": "yes"},
        "seen is beyond any request": lambda header: header | {"seen": 10**19},
        "seen is true": lambda header: header | {"seen": True},
        "a list": lambda header: [header],
        "last is a list": lambda header: header | {"last": [1]},
        "last has no detector": lambda header: header | {"last": {"seen": 0, "count": 100, "digest": ""}},
        "last without bounds": lambda header: header | {"last": header["last"] | {"count": 1e400}},
        "an answer shorter than it is": lambda header: header | {"answer_bytes": 0},
        "an answer longer than it is": lambda header: header | {"answer_bytes": 10**9},
    }


@pytest.mark.parametrize("wrong", [*wrong_headers(), "nested"])
def test_a_header_that_nobody_wrote_is_a_damaged_checkpoint(
    begin: Begin, detector: Detector, reports: pd.DataFrame, wrong: str
) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    content = store.contents[PATH]
    magic, start = content[:20], 20 + 32 + 4
    end = start + int.from_bytes(content[start - 4 : start], "big")
    header = b"[" * 4000
    if wrong != "nested":
        header = json.dumps(wrong_headers()[wrong](json.loads(content[start:end]))).encode()
    rest = len(header).to_bytes(4, "big") + header + content[end:]
    store.contents[PATH] = magic + hashlib.sha256(rest).digest() + rest
    streams = begin(store)
    if "answer" not in wrong and "last" not in wrong:
        assert streams.status("s") is None
    assert scores(ask(streams, reports.iloc[:5])) == offline(detector, reports.iloc[:5])
    assert streams.counters.set_aside == 1


def test_a_small_checkpoint_cannot_hold_a_huge_answer(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    content = store.contents[PATH]
    start = 20 + 32 + 4
    end = start + int.from_bytes(content[start - 4 : start], "big")
    header = json.loads(content[start:end])
    for claimed in (0, 10):
        changed = json.dumps(header | {"answer_bytes": claimed}).encode()
        state = content[end : end + header["state_bytes"]]
        rest = len(changed).to_bytes(4, "big") + changed + state + zlib.compress(bytes(50_000_000), 9)
        store.contents[PATH] = content[:20] + hashlib.sha256(rest).digest() + rest
        streams = begin(store)
        tracemalloc.start()
        try:
            assert ask(streams, reports.iloc[:5]).seen == 5
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()
        assert streams.counters.set_aside == 1


def test_the_checkpoint_of_another_stream_is_not_taken_for_this_one(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], stream="other", seen=0)
    before.close()
    store.contents[PATH] = store.contents[PATH.replace("/s.", "/other.")]
    assert ask(begin(store), reports.iloc[:5]).seen == 5


def test_a_checkpoint_of_another_kernel_is_set_aside(
    begin: Begin, reports: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    monkeypatch.setattr("flowsentry.features.kernel.KERNEL_VERSION", "other")
    streams = begin(store)
    assert ask(streams, reports.iloc[:5]).seen == 5
    assert streams.counters.set_aside == 1


def test_another_view_has_streams_of_its_own(begin: Begin, small: Small, reports: pd.DataFrame) -> None:
    store = ListStore()
    ours, study = begin(store), begin(store, of=trained(small, "paper"))
    ask(ours, reports.iloc[:100], seen=0)
    ask(study, reports.iloc[:50], seen=0)
    ours.checkpoint()
    study.checkpoint()
    assert sorted(store.contents) == [PATH, f"paper-{paper.VERSION}/s.state"]


def test_another_detector_of_the_same_view_goes_on_with_the_same_state(
    begin: Begin, small: Small, reports: pd.DataFrame
) -> None:
    store = ListStore()
    champion = begin(store)
    ask(champion, reports.iloc[:2500], seen=0)
    assert champion.release() == 1 and len(champion) == 0
    other = trained(small, family="logistic_regression")
    taken = ask(begin(store, of=other), reports.iloc[2500:], seen=2500)
    alone = other.verdicts(reports).iloc[2500:]
    assert taken.judged is not None
    assert taken.judged.warm.tolist() == alone["warm"].tolist()
    is_new = ~alone["flow"].isin(other.verdicts(reports).iloc[:2500]["flow"]).to_numpy()
    assert is_new.sum() > 100
    assert taken.judged.score[is_new].tolist() == alone["anomaly_score"][is_new].tolist()


def test_release_waits_for_a_request_and_keeps_what_it_cannot_write(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store)
    entered = threading.Event()

    def hold() -> None:
        entered.set()
        time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, streams, reports.iloc[:9], seen=0, before_answer=hold)
        assert entered.wait(10)
        assert streams.release() == 1
        assert running.result().seen == 9
    position = begin(store).status("s")
    assert position is not None and position.seen == 9
    ask(streams, reports.iloc[9:12], seen=9)
    store.is_down = True
    assert streams.release() == 0
    assert ask(streams, reports.iloc[12:15], seen=12).seen == 15


def test_a_forgotten_stream_is_gone_from_memory_and_store(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    streams = begin(store)
    ask(streams, reports.iloc[:100], seen=0)
    streams.checkpoint()
    streams.forget("s")
    assert len(streams) == 0 and not store.contents and streams.status("s") is None
    streams.forget("s")
    streams.checkpoint()
    assert not store.contents
    assert ask(streams, reports.iloc[:5], seen=0).seen == 5
    store.is_down = True
    with pytest.raises(StoreError):
        streams.forget("s")
    assert ask(streams, reports.iloc[5:9], seen=5).seen == 9


def test_a_stored_stream_can_be_forgotten_without_opening_it(begin: Begin, reports: pd.DataFrame) -> None:
    store = ListStore()
    before = begin(store)
    ask(before, reports.iloc[:100], seen=0)
    before.close()
    streams = begin(store)
    assert streams.status("s") == Position("s", 100, 100, False)
    streams.forget("s")
    assert not store.contents and len(streams) == 0


def test_the_status_tells_where_a_stream_is(begin: Begin, reports: pd.DataFrame) -> None:
    streams = begin(ListStore())
    assert streams.status("s") is None
    ask(streams, reports.iloc[:100], seen=0)
    assert streams.status("s") == Position("s", 100, 0, False)
    ask(streams, reports.iloc[100:], seen=100)
    streams.checkpoint()
    assert streams.status("s") == Position("s", len(reports), len(reports), True)


def test_a_request_that_breaks_leaves_the_stream_as_it_is_stored(
    begin: Begin, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    streams = begin(ListStore())
    ask(streams, reports.iloc[:100], seen=0)
    streams.checkpoint()

    def fail() -> None:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError):
        ask(streams, reports.iloc[100:200], seen=100, before_answer=fail)
    assert scores(ask(streams, reports.iloc[100:200], seen=100)) == expected[100:200]


def test_a_request_is_answered_while_a_slow_store_writes(begin: Begin, reports: pd.DataFrame) -> None:
    store = Slow()
    streams = begin(store, Limits(checkpoint_flows=10, checkpoint_seconds=1e6))
    ask(streams, reports.iloc[:20], seen=0)
    assert store.writing.wait(10)
    assert streams.is_open("s")
    assert ask(streams, reports.iloc[20:25], seen=20).durable == 0
    store.go.set()
    wait_for(lambda: ask(streams, [], seen=25).durable == 20)
