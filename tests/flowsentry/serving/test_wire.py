"""Requests to arrays, as the offline path reads the same flows, and rejects; hostile bodies; answers."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsentry.features.views import Feature
from flowsentry.flows import sources
from flowsentry.flows.columns import Columns
from flowsentry.flows.expectations import validate
from flowsentry.reasons import AT_HAND, Told
from flowsentry.serving import _values, wire
from flowsentry.serving.protocol import ARROW, JSON, NDJSON
from flowsentry.serving.wire import Batch, Head, Malformed

NOW_MS = int(pd.Timestamp("2026-03-01T12:00:00Z").timestamp() * 1000)
parse = partial(wire.parse, max_flows=10_000, now_ms=NOW_MS)
TYPES = (JSON, NDJSON, ARROW)


def flow(**changes: Any) -> dict[str, Any]:
    """An ordinary flow; a change to `...` leaves the key out."""
    ordinary = {
        "flow_id": "EAT/////AP//////CP8AAAEKgAA", "final": True, "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2",
        "src_port": 40_000, "dst_port": 80, "transport": "tcp", "bytes": 1000, "time": "2026-03-01T11:00:00.123Z",
        "duration": 5_000_000, "packets": 10,
    }  # fmt: skip
    return {name: value for name, value in {**ordinary, **changes}.items() if value is not ...}


GOOD = [
    flow(),
    flow(flow_id="é☃", src_ip="fe80::1", dst_ip="2001:db8::2", bytes=950, packets=10),
    flow(src_ip="10.0.0.1", bytes=800, packets=10, final=False),
    flow(packets=None, bytes=400),
    flow(packets=None, bytes=401, dst_port=65_535, src_port=0),
    flow(transport="icmp", src_port=None, dst_port=None),
    flow(transport=None, src_port=None),
    flow(transport="UDP", bytes=0, duration=0),
    flow(transport="Ipv6-Icmp", src_ip="fe80::1%eth0", src_port=None, dst_port=None),
    flow(transport="gre", src_port=None, dst_port=None),
    flow(bytes=2**53, duration=10 * 365 * 86_400 * 10**9, packets=2**53),
    flow(time="2026-03-01T11:00:00Z"),
    flow(time="2026-03-01T11:00:00.999999999Z"),
    flow(time="2026-03-01 11:00:00.5"),
    flow(time="2026-03-01T13:00:00.0001+02:00"),
    flow(time="2026-03-01T05:30:00-0530"),
    flow(time="2026-02-28T24:00:00Z"),
    flow(time="2024-02-29T23:59:59.000001Z"),
    flow(time="1970-01-01T00:00:00Z"),
    flow(bytes=5.0, src_port=80.0, packets=3.0),
]


def encode(media_type: str, flows: list[Any]) -> bytes:
    """A body; for Arrow the types that a careful client would choose."""
    if media_type == JSON:
        return orjson.dumps({"flows": flows})
    if media_type == NDJSON:
        return b"\n".join(map(orjson.dumps, flows))
    names = [name for name in _values.COLUMNS if any(name in flow for flow in flows)]
    columns: dict[str, pa.Array] = {}
    for name in names:
        values = [flow.get(name) for flow in flows]
        if name == "time":
            columns[name] = pa.array([_values._instant(time) for time in values], pa.timestamp("us", "UTC"))
        elif any(isinstance(value, float) for value in values):
            columns[name] = pa.array([value if value is None else int(value) for value in values], pa.int64())
        else:
            columns[name] = pa.array(values)
    return stream_of(pa.table(columns))


def stream_of(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


PACKETBEAT = {
    "flow_id": "flow.id", "final": "flow.final", "src_ip": "source.ip", "dst_ip": "destination.ip",
    "src_port": "source.port", "dst_port": "destination.port", "transport": "network.transport",
    "bytes": "network.bytes", "time": "@timestamp", "duration": "event.duration", "packets": "network.packets",
}  # fmt: skip


def offline(flows: list[Any], folder: Path) -> tuple[pd.DataFrame, dict[int, str]]:
    """What the offline path makes of the same flows: the good reports, and the first reason of every bad one."""
    path = folder / "flows.ndjson"
    events = [{PACKETBEAT.get(name, name): value for name, value in flow.items()} for flow in flows]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    loaded = sources.read([path])
    validated = validate(
        loaded.reports,
        quarantined_at_load=loaded.quarantine,
        rows_read=loaded.rows_read,
        max_quarantine_share=1.0,
    )
    aside = validated.quarantine
    reasons = {row - 1: reason.split("; ")[0] for row, reason in zip(aside["row"], aside["reason"], strict=True)}
    return validated.reports.sort_values("row", ignore_index=True), reasons


@pytest.mark.parametrize("flows", [GOOD, [{k: v for k, v in f.items() if k != "packets"} for f in GOOD[:3]]])
def test_a_request_becomes_the_arrays_and_the_table_of_the_offline_path(
    flows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # far from its recording, a time is set aside by a rule that only a whole recording can have
    near = [flow for flow in flows if not flow["time"].startswith(("1970", "2024"))]
    reports, _ = offline(near, tmp_path)
    expected = Columns.of(reports)
    for media_type in TYPES:
        assert parse(encode(media_type, flows), media_type).rejected == []
        batch = parse(encode(media_type, near), media_type)
        assert (batch.rejected, batch.count) == ([], len(reports))
        assert batch.index.tolist() == list(range(len(near)))
        assert batch.flow_ids == [flow["flow_id"] for flow in near]
        for field in dataclasses.fields(Columns):
            if field.name != "table":
                ours, theirs = getattr(batch.columns, field.name), getattr(expected, field.name)
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs, field.name)
        table = batch.columns.table()
        assert ("packets" in table) == ("packets" in reports)
        names = [name for name in table.columns if name not in ("recording", "file")]
        pd.testing.assert_frame_equal(table[names], reports[names], check_categorical=False)


@given(st.lists(st.from_regex(_values._TIME, fullmatch=True), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_times_are_read_as_the_offline_path_reads_them(texts: list[str]) -> None:
    from flowsentry.flows._typing import _value, connect

    connection = connect()
    connection.register("chunk", pa.table({"x_time": texts}))
    micros = connection.sql(f"SELECT epoch_us({_value('time')}) FROM chunk").fetchall()
    connection.close()
    rejects = _values.Rejects()
    times = _values.times(texts, rejects)
    bad = {place for place, _ in rejects.listed()}
    assert [None if place in bad else time for place, time in enumerate(times.tolist())] == [us for (us,) in micros]


@given(st.lists(st.datetimes(pd.Timestamp("1970-01-01"), pd.Timestamp("2261-12-31")), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_fast_reading_of_times_equals_the_slow_one(moments: list[Any]) -> None:
    texts = [f"{moment.isoformat()}Z" for moment in moments]
    times = np.zeros(len(texts), np.int64)
    assert _values._instants(*_values.encoded(texts), times) == 0
    assert times.tolist() == [_values._instant(text) for text in texts]


HOSTILE: list[tuple[dict[str, Any], str | None]] = [
    ({"flow_id": None}, "flow_id is missing"),
    ({"flow_id": ""}, "flow_id is missing"),
    ({"src_ip": None}, "src_ip is missing"),
    ({"dst_ip": "db"}, "dst_ip is not an IPv4 or IPv6 address"),
    ({"src_ip": "10.0.0.256"}, "src_ip is not an IPv4 or IPv6 address"),
    ({"src_ip": "010.0.0.1"}, "src_ip is not an IPv4 or IPv6 address"),
    ({"src_ip": "1.2.3"}, "src_ip is not an IPv4 or IPv6 address"),
    ({"src_ip": "::1%" + "x" * 80}, "src_ip is not an IPv4 or IPv6 address"),
    ({"src_port": 65_536}, "src_port is not within 0..65535"),
    ({"dst_port": -1}, "dst_port is not within 0..65535"),
    ({"src_port": 2**40}, "src_port is not a whole number"),
    ({"src_port": True}, "src_port is not a whole number"),
    ({"src_port": 80.5}, "src_port is not a whole number"),
    ({"src_port": None}, "a port is missing although transport is tcp or udp"),
    ({"dst_port": None, "transport": "udp"}, "a port is missing although transport is tcp or udp"),
    ({"transport": "quic"}, "transport is not known"),
    ({"bytes": None}, "bytes is missing"),
    ({"bytes": -1}, "bytes is not within 0..9007199254740992"),
    ({"bytes": 2**53 + 2}, "bytes is not within 0..9007199254740992"),
    ({"bytes": 2**63}, "bytes is not a whole number"),
    ({"bytes": 2**70}, "bytes is not a whole number"),
    ({"bytes": 1e30}, "bytes is not a whole number"),
    ({"duration": -1}, "duration is not within 0..315360000000000000"),
    ({"duration": 10 * 365 * 86_400 * 10**9 + 64}, "duration is not within 0..315360000000000000"),
    ({"packets": -3}, "packets is not within 0..9007199254740992"),
    ({"packets": 1.5}, "packets is not a whole number"),
    ({"time": None}, "time is missing"),
    ({"time": "yesterday"}, "time is not a timestamp"),
    ({"time": "2026-02-30T00:00:00Z"}, "time is not a timestamp"),
    ({"time": "2026-02-28T23:59:60Z"}, "time is not a timestamp"),
    ({"time": "2262-01-01T00:00:00Z"}, "time is not a timestamp"),
    ({"time": "1969-12-31T23:59:59Z"}, "time is not a timestamp"),
    ({"time": "٢٠٢٦-02-28T00:00:00Z"}, "time is not a timestamp"),
    ({"final": "maybe"}, "final is not true or false"),
    ({"bytes": -1, "duration": None, "src_ip": "x"}, "duration is missing"),
    ({"bytes": -1, "dst_port": -1}, "bytes is not within 0..9007199254740992"),
    ({"label": "benign", "extra": {"deep": [1]}}, None),
]


@pytest.mark.parametrize("media_type", [JSON, NDJSON])
def test_the_service_rejects_the_rows_that_validation_rejects_for_the_same_reasons(
    media_type: str, tmp_path: Path
) -> None:
    flows = [flow(flow_id=f"f{i}") | changes for i, (changes, _) in enumerate(HOSTILE)]
    expected = {i: reason for i, (_, reason) in enumerate(HOSTILE) if reason}
    body = json.dumps({"flows": flows}).encode() if media_type == JSON else "\n".join(map(json.dumps, flows)).encode()
    batch = parse(body, media_type)
    assert dict(batch.rejected) == expected
    assert set(expected.values()) <= set(_values.REASONS)
    assert batch.index.tolist() == [i for i in range(len(flows)) if i not in expected]
    assert batch.count == len(flows)
    if media_type == JSON:
        _, reasons = offline(flows, tmp_path)
        no_event = "not a flow event"  # what a Packetbeat event without a flow id is
        assert {i: "flow_id is missing" if reason == no_event else reason for i, reason in reasons.items()} == expected


ONLINE_ONLY: list[tuple[Any, str]] = [
    (flow(flow_id="x" * 257), "flow_id is longer than 256 characters"),
    (flow(flow_id=7), "flow_id is not text"),
    (flow(flow_id=["a"]), "flow_id is not text"),
    (flow(src_ip=7), "src_ip is not an IPv4 or IPv6 address"),
    (flow(dst_ip={"a": 1}), "dst_ip is not an IPv4 or IPv6 address"),
    (flow(src_port="80"), "src_port is not a whole number"),
    (flow(transport=6), "transport is not known"),
    (flow(transport=[]), "transport is not known"),
    (flow(time=NOW_MS + 600_001), "time is ahead of the service's clock"),
    (flow(time="2026-03-01T12:10:00.001Z"), "time is ahead of the service's clock"),
    (flow(time=-1), "time is not a timestamp"),
    (flow(time=2**62), "time is not a timestamp"),
    (flow(time=True), "time is not a timestamp"),
    (flow(final=1), "final is not true or false"),
    (7, "not a JSON object"),
    (None, "not a JSON object"),
    ([flow()], "not a JSON object"),
    ({}, "flow_id is missing"),
]


@pytest.mark.parametrize("media_type", [JSON, NDJSON])
def test_what_no_file_could_hold_is_rejected_in_its_place(media_type: str) -> None:
    flows = [entry for bad, _ in ONLINE_ONLY for entry in (bad, flow())]
    batch = parse(encode(media_type, flows), media_type)
    assert batch.rejected == [(2 * i, reason) for i, (_, reason) in enumerate(ONLINE_ONLY)]
    assert batch.index.tolist() == list(range(1, len(flows), 2))
    assert len(batch.columns) == len(batch.flow_ids) == len(ONLINE_ONLY)
    assert {reason for _, reason in batch.rejected} <= set(_values.REASONS)


@pytest.mark.parametrize("time", [NOW_MS, NOW_MS + 600_000, "2026-03-01T12:10:00.000Z"])
def test_a_time_may_be_whole_milliseconds_and_ten_minutes_ahead(time: Any) -> None:
    batch = parse(encode(JSON, [flow(time=time)]), JSON)
    assert batch.rejected == []
    assert batch.columns.time[0] in (NOW_MS, NOW_MS + 600_000)


def test_final_and_packets_and_ports_may_be_left_out() -> None:
    bare = flow(final=..., packets=..., src_port=..., dst_port=..., transport=...)
    batch = parse(encode(JSON, [bare, flow(), bare]), JSON)
    assert batch.rejected == []
    assert batch.columns.final.tolist() == [False, True, False]
    assert batch.columns.src_port.tolist() == [0, 40_000, 0]
    assert batch.columns.transport.tolist() == [0, 6, 0]


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"nonsense", b"[]", b"7", b"null", b'{"flows": {}}', b'{"flow": []}', b'{"flows": [NaN]}',
        b'{"flows": [1e999]}', b"[" * 20_000, b'{"flows":' + b"[" * 20_000, b'{"flows": ["\xff"]}',
        b'{"flows": ["\\ud800"]}', b"\xef\xbb\xbf{}", b'{"flows": []} {}', "{}".encode("utf-16"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_the_json_of_a_request_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed) as malformed:
        parse(body, JSON)
    assert malformed.value.code == "invalid"
    assert malformed.value.detail in (
        "the body is not valid JSON in UTF-8",
        'the body is not an object with a list "flows"',
    )


def test_the_last_of_equal_keys_counts() -> None:
    text = json.dumps(flow())[:-1] + ', "bytes": 77}'
    assert parse(f'{{"flows": [], "flows": [{text}]}}'.encode(), JSON).columns.bytes.tolist() == [77]


def test_a_bad_line_is_rejected_alone_and_blank_lines_are_none() -> None:
    good = orjson.dumps(flow())
    lines = [b"", good, good + b"," + good, b"  \r", good[:-5], good + b"\r", b'{"a":[1', b"2]}", b"\xff", good, b""]
    batch = parse(b"\n".join(lines), NDJSON)
    assert batch.index.tolist() == [0, 3, 7]
    assert batch.rejected == [(place, "not a JSON object") for place in (1, 2, 4, 5, 6)]
    assert batch.count == 8


@pytest.mark.parametrize("body", [b"", b"\n", b" \n\r\n"])
def test_an_empty_ndjson_body_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed, match="empty"):
        parse(body, NDJSON)


@pytest.mark.parametrize("media_type", TYPES)
def test_as_many_flows_as_allowed_and_not_one_more(media_type: str) -> None:
    body = encode(media_type, [flow()] * 5)
    assert wire.parse(body, media_type, max_flows=5, now_ms=NOW_MS).count == 5
    with pytest.raises(Malformed) as malformed:
        wire.parse(body, media_type, max_flows=4, now_ms=NOW_MS)
    assert malformed.value.code == "too_large"


BOMBS = {
    "objects": b"{},",
    "lists": b"[],",
    "numbers": b"999,",
    "texts": b'"ab",',
    "names": b'{"a":0,"b":0,"c":0},',
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("media_type", [JSON, NDJSON])
def test_many_values_are_refused_before_they_take_memory(media_type: str, kind: str) -> None:
    values = (BOMBS[kind] * 500_000).rstrip(b",")
    body = b'{"flows":[%s]}' % values if media_type == JSON else b"[%s]\n" % values
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match=r"more than [0-9]+ (objects|lists|values) in the request") as malformed:
            wire.parse(body, media_type, max_flows=1000, now_ms=NOW_MS)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()
    assert malformed.value.code == "too_large"


@pytest.mark.parametrize("media_type", [JSON, NDJSON])
def test_flows_may_have_as_many_other_keys_again(media_type: str) -> None:
    given = [
        flow(flow_id=f"[{{{n}", tags=[], where={}, **{f"other {key}": "x" for key in range(9)}) for n in range(999)
    ]
    assert len(wire.parse(encode(media_type, given), media_type, max_flows=1000, now_ms=NOW_MS).flow_ids) == 999


def test_a_flood_of_blank_lines_is_refused_before_it_is_split() -> None:
    with pytest.raises(Malformed) as malformed:
        parse(b"\n" * 20_001, NDJSON)
    assert malformed.value.code == "too_large"


def test_an_unknown_media_type_is_named_as_such() -> None:
    with pytest.raises(Malformed) as malformed:
        parse(b"", "text/plain")
    assert malformed.value.code == "unsupported_media_type"


@pytest.mark.parametrize("media_type", [JSON, ARROW])
def test_no_flows_are_an_empty_batch(media_type: str) -> None:
    body = orjson.dumps({"flows": []}) if media_type == JSON else stream_of(table()[:0])
    batch = parse(body, media_type)
    assert (batch.count, len(batch.columns), batch.flow_ids, batch.rejected) == (0, 0, [], [])
    assert len(batch.columns.table()) == 0


# Arrow


def table(**changes: Any) -> pa.Table:
    """Three ordinary flows; a change is a column, None leaves it out."""
    columns = {name: pa.array([value] * 3) for name, value in flow(time=...).items()}
    columns["time"] = pa.array([NOW_MS] * 3, pa.timestamp("ms", "UTC"))
    columns |= changes
    return pa.table({name: column for name, column in columns.items() if column is not None})


PLAIN = parse(stream_of(table()), ARROW)
NUMBERS = ("time", "flow_id", "src_ip", "dst_ip", "final", "src_port", "dst_port", "transport", "bytes", "duration")


@pytest.mark.parametrize(
    "changes",
    [
        {"flow_id": pa.array([flow()["flow_id"]] * 3, pa.large_string())},
        {name: pa.array([flow()[name]] * 3).dictionary_encode() for name in ("flow_id", "src_ip", "transport")},
        {"src_ip": pa.DictionaryArray.from_arrays([1, 1, 1], ["not used, no address", "10.0.0.1"])},
        {"transport": pa.DictionaryArray.from_arrays([1, 1, 1], ["quic", "TCP"])},
        {"src_port": pa.array([40_000] * 3, pa.uint16()), "bytes": pa.array([1000] * 3, pa.uint64())},
        {"src_port": pa.array([40_000.0] * 3), "bytes": pa.array([1000.0] * 3, pa.float32())},
        {"time": pa.array([NOW_MS // 1000] * 3, pa.timestamp("s"))},
        {"time": pa.array([NOW_MS * 10**6] * 3, pa.timestamp("ns", "Europe/Paris"))},
        {"time": pa.array([NOW_MS] * 3)},
        {"time": pa.array(["2026-03-01T12:00:00Z"] * 3)},
        {"packets": pa.nulls(3)},
        {"junk": pa.array([[1], [], None]), "label": pa.array(["benign"] * 3)},
    ],
)
def test_arrow_types_that_mean_the_same_give_the_same(changes: dict[str, Any]) -> None:
    batch = parse(stream_of(table(**changes)), ARROW)
    assert batch.rejected == []
    for name in NUMBERS:
        np.testing.assert_array_equal(getattr(batch.columns, name), getattr(PLAIN.columns, name))
    assert batch.columns.table()["time"].tolist() == PLAIN.columns.table()["time"].tolist()


def test_several_record_batches_with_dictionaries_of_their_own_are_one_request() -> None:
    parts = [table(src_ip=pa.array([ip] * 3).dictionary_encode()) for ip in ("10.0.0.1", "10.9.9.9")]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, parts[0].schema) as stream:
        for part in parts:
            stream.write_table(part)
    batch = parse(sink.getvalue().to_pybytes(), ARROW)
    single = parse(encode(JSON, [flow(time=NOW_MS)] * 3 + [flow(time=NOW_MS, src_ip="10.9.9.9")] * 3), JSON)
    np.testing.assert_array_equal(batch.columns.src_ip, single.columns.src_ip)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        (
            {"flow_id": pa.array(["a", None, "c" * 257])},
            {1: "flow_id is missing", 2: "flow_id is longer than 256 characters"},
        ),
        (
            {"src_ip": pa.array(["10.0.0.1", "x", None])},
            {1: "src_ip is not an IPv4 or IPv6 address", 2: "src_ip is missing"},
        ),
        (
            {"src_ip": pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), ["10.0.0.1", "x"])},
            {1: "src_ip is not an IPv4 or IPv6 address", 2: "src_ip is missing"},
        ),
        (
            {"bytes": pa.array([1, None, 2**64 - 1], pa.uint64())},
            {1: "bytes is missing", 2: "bytes is not a whole number"},
        ),
        (
            {"bytes": pa.array([1.0, float("nan"), float("inf")])},
            {1: "bytes is missing", 2: "bytes is not a whole number"},
        ),
        ({"bytes": pa.array(["1"] * 3)}, dict.fromkeys(range(3), "bytes is not a whole number")),
        ({"bytes": None}, dict.fromkeys(range(3), "bytes is missing")),
        ({"bytes": pa.array([1] * 3, pa.timestamp("ms"))}, dict.fromkeys(range(3), "bytes is not a whole number")),
        (
            {"src_port": pa.array([None, 70_000, 1])},
            {0: "a port is missing although transport is tcp or udp", 1: "src_port is not within 0..65535"},
        ),
        ({"src_port": pa.array([2**32 + 80, 80, 80])}, {0: "src_port is not a whole number"}),
        ({"transport": pa.array(["tcp", "quic", "udp"])}, {1: "transport is not known"}),
        (
            {"time": pa.array([None, -1, 2**62], pa.timestamp("s"))},
            {0: "time is missing", 1: "time is not a timestamp", 2: "time is not a timestamp"},
        ),
        ({"time": pa.array([NOW_MS + 600_001, 0, 0], pa.timestamp("ms"))}, {0: "time is ahead of the service's clock"}),
        ({"final": pa.array(["yes"] * 3)}, dict.fromkeys(range(3), "final is not true or false")),
    ],
)
def test_bad_arrow_values_are_rejected_in_their_place(changes: dict[str, Any], reasons: dict[int, str]) -> None:
    batch = parse(stream_of(table(**changes)), ARROW)
    assert dict(batch.rejected) == reasons
    assert batch.index.tolist() == [place for place in range(3) if place not in reasons]
    assert len(batch.columns.table()) == len(batch.index)


def test_a_dictionary_cannot_blow_texts_up() -> None:
    long = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), ["x" * 1_000_000])
    bomb = pa.table({name: long for name in ("flow_id", "src_ip", "dst_ip", "transport", "time")})
    before = pa.total_allocated_bytes()
    batch = parse(stream_of(bomb), ARROW)
    assert len(batch.rejected) == 10_000
    assert pa.total_allocated_bytes() - before < 50_000_000


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("where", ["values", "dictionary"])
def test_compressed_batches_are_refused(codec: str, where: str) -> None:
    if not pa.Codec.is_available(codec):
        pytest.skip(f"this build of pyarrow has no {codec}")
    text = pa.array(["10.0.0.1"] * 3)
    body = stream_of(table(src_ip=text.dictionary_encode() if where == "dictionary" else text), codec)
    with pytest.raises(Malformed, match="compressed"):
        parse(body, ARROW)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a"]] * 3), pa.array([{"a": 1}] * 3), pa.array([b"a"] * 3), pa.array(["a"] * 3, pa.string_view()),
        pa.array([1, 2, 3]).dictionary_encode(), pa.array([1, 2, 3], pa.date32()), pa.nulls(3, pa.decimal128(9)),
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 1], pa.int8())),
        pa.RunEndEncodedArray.from_arrays([3], ["a"]),
    ],
)  # fmt: skip
def test_types_that_no_column_has_are_refused(column: pa.Array) -> None:
    for name in ("flow_id", "bytes", "final"):
        with pytest.raises(Malformed, match="nested or extension"):
            parse(stream_of(table(**{name: column})), ARROW)


def test_a_table_without_a_column_of_a_flow_is_not_decoded_and_all_its_rows_are_rejected() -> None:
    batch = parse(stream_of(pa.table({"junk": [[1], [2]], "label": ["benign", "benign"]})), ARROW)
    assert batch.rejected == [(0, "flow_id is missing"), (1, "flow_id is missing")]


def test_a_column_that_is_there_twice_is_refused() -> None:
    twice = pa.Table.from_arrays([*table().columns, table()["bytes"]], [*table().column_names, "bytes"])
    with pytest.raises(Malformed, match="twice"):
        parse(stream_of(twice), ARROW)


def test_the_number_of_rows_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytearray(stream_of(pa.table({"packets": pa.nulls(3)})))
    message = body.rindex(struct.pack("<q", 3), 0, body.rindex(struct.pack("<q", 3)) + 8)
    assert parse(bytes(body), ARROW).count == 3
    for place in range(message - 64, message + 1):
        if body[place : place + 8] == struct.pack("<q", 3):
            body[place : place + 8] = struct.pack("<q", 2**40)
    monkeypatch.setattr(pa.ipc, "open_stream", lambda *args, **options: pytest.fail("it was decoded"))
    with pytest.raises(Malformed) as malformed:
        parse(bytes(body), ARROW)
    assert malformed.value.code == "too_large"


def test_too_many_record_batches_are_refused() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as stream:
        for _ in range(1001):
            stream.write_table(table()[:1])
    with pytest.raises(Malformed, match="too many record batches"):
        parse(sink.getvalue().to_pybytes(), ARROW)


@pytest.mark.parametrize(
    "body", [b"", b"\0" * 64, b"ARROW1\0\0" + b"\0" * 64, b"\xff" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_arrow_stream_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed, match="not an Arrow IPC stream"):
        parse(body, ARROW)


def test_an_arrow_stream_that_ends_early_is_malformed() -> None:
    body = stream_of(table())
    for end in range(0, len(body) - 8, 7):
        with pytest.raises(Malformed):
            parse(body[:end], ARROW)


# Fuzz: whatever comes, it is Malformed or every flow has its place.


def survive(body: bytes, media_type: str) -> None:
    try:
        batch = wire.parse(body, media_type, max_flows=50, now_ms=NOW_MS)
    except Malformed as malformed:
        assert malformed.code in ("invalid", "too_large")
        return
    places = sorted([*batch.index.tolist(), *(place for place, _ in batch.rejected)])
    assert places == list(range(batch.count))
    assert {reason for _, reason in batch.rejected} <= set(_values.REASONS)
    assert all(len(getattr(batch.columns, name)) == len(batch.index) for name in NUMBERS)
    assert all(1 <= len(name) <= 256 for name in batch.flow_ids)
    assert (batch.columns.bytes >= 0).all() and (batch.columns.bytes <= 2**53).all()
    assert (batch.columns.src_port >= 0).all() and (batch.columns.src_port <= 65_535).all()
    assert len(batch.columns.table()) == len(batch.index)
    for answer_type in TYPES:
        assert read(answer_type, wire.answer(answer_type, HEAD, judged(len(batch.index)), batch)) is not None


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
odd_flow = st.builds(
    lambda base, odd: base | odd, st.sampled_from(GOOD), st.dictionaries(st.sampled_from(_values.COLUMNS), anything)
)


@given(st.lists(odd_flow | anything, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_json_breaks_the_service(flows: list[Any]) -> None:
    survive(json.dumps({"flows": flows}).encode("utf-8", "replace"), JSON)
    survive("\n".join(map(json.dumps, flows)).encode("utf-8", "replace"), NDJSON)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_to_a_body_breaks_the_service(data: st.DataObject) -> None:
    media_type = data.draw(st.sampled_from(TYPES))
    whole = BODIES[media_type]
    body = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 8))
        change = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.integers(-(2**63), 2**63 - 1).map(partial(int.to_bytes, length=8, byteorder="little", signed=True))
        )
        body[place : place + len(change)] = change
    survive(bytes(body[: data.draw(st.sampled_from([len(body), len(body) // 2]))]), media_type)


# Answers


HEAD = Head("default", 120, 100, "12", "behaviour", "2", 3.0)
FEATURES = (
    Feature(name="edge_fails_60s", unit="flows", description="", anomaly="failed connections", window="60s"),
    Feature(name="edge_burst", unit="ratio", description="", anomaly="burst", window="history"),
)


def judged(count: int, malicious: tuple[int, ...] = ()) -> Any:
    """What a detector would say: those malicious at these places, each with two reasons."""
    bad = np.isin(np.arange(count), malicious)

    def told(places: np.ndarray) -> Told:
        count = len(places)
        ends, feature = 2 * np.arange(count + 1), np.array([1, 0] * count, np.int64)
        value, share = np.array([51.5, 7.0] * count, float), np.array([0.75, 0.25] * count, float)
        return Told(FEATURES, ends, feature, value, feature == 0, share, ["51.5 times as many", "many failed"] * count)

    return SimpleNamespace(
        detector=SimpleNamespace(manifest=SimpleNamespace(features=FEATURES)),
        score=np.where(bad, 4.123456789012345, np.arange(count) / 7),
        malicious=bad,
        first_alarm=np.where(bad, NOW_MS + 7, 0),
        warm=np.arange(count) % 2 == 0,
        told=told,
    )


BODIES = {media_type: encode(media_type, GOOD) for media_type in TYPES}


def read(media_type: str, content: bytes) -> list[dict[str, Any]]:
    """The verdicts and rejects of an answer, one per flow in order, in one form."""
    if media_type == NDJSON:
        return [orjson.loads(line) for line in content.splitlines()]
    if media_type == JSON:
        answer = orjson.loads(content)
        rejects = [{"index": reject["index"], "rejected": reject["reason"]} for reject in answer["rejected"]]
        return sorted([*answer["verdicts"], *rejects], key=lambda line: line["index"])
    rows = pa.ipc.open_stream(content).read_all().to_pylist()
    for row in rows:
        if row["first_alarm"] is not None:
            row["first_alarm"] = row["first_alarm"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return [
        {k: v for k, v in row.items() if (k in ("index", "rejected")) == (row["rejected"] is not None) or k == "index"}
        for row in rows
    ]


def mixed(media_type: str = JSON) -> Batch:
    batch = parse(orjson.dumps({"flows": [{}, flow(), flow(flow_id='quo"te\n☃'), 7, flow(), {}]}), JSON)
    assert [place for place, _ in batch.rejected] == [0, 3, 5]
    return batch


@pytest.mark.parametrize("media_type", TYPES)
def test_every_flow_is_answered_in_its_place_with_every_field(media_type: str) -> None:
    lines = read(media_type, wire.answer(media_type, HEAD, judged(3, malicious=(1,)), mixed()))
    assert [line["index"] for line in lines] == list(range(6))
    assert [place for place, line in enumerate(lines) if "rejected" in line] == [0, 3, 5]
    assert lines[3] == {"index": 3, "rejected": "not a JSON object"}
    common = {"threshold": 3.0, "model_version": "12", "view_version": "2"}
    assert lines[1] == common | {
        "index": 1, "flow_id": flow()["flow_id"], "label": "benign", "anomaly_score": 0.0, "anomaly_type": None,
        "baseline_window": None, "warm": True, "first_alarm": None, "reasons": [],
    }  # fmt: skip
    assert lines[2] == common | {
        "index": 2, "flow_id": 'quo"te\n☃', "label": "malicious", "anomaly_score": 4.123456789012345,
        "anomaly_type": "burst", "baseline_window": "history", "warm": False,
        "first_alarm": "2026-03-01T12:00:00.007Z",
        "reasons": [
            {"feature": "edge_burst", "value": 51.5, "unit": "ratio", "share": 0.75, "text": "51.5 times as many"},
            {"feature": "edge_fails_60s", "value": None, "unit": "flows", "share": 0.25, "text": "many failed"},
        ],
    }  # fmt: skip


def test_the_three_types_say_the_same() -> None:
    batch = parse(BODIES[JSON], JSON)
    verdicts = judged(len(GOOD), malicious=(0, 3, len(GOOD) - 1))
    one, two, three = (read(media_type, wire.answer(media_type, HEAD, verdicts, batch)) for media_type in TYPES)
    assert one == two == three


def test_the_three_types_say_the_same_of_more_flows_than_are_made_objects_at_a_time() -> None:
    flows = [flow(flow_id=str(i)) if i % 5 else {} for i in range(5 * AT_HAND)]
    batch = parse(encode(JSON, flows), JSON)
    count = len(batch.flow_ids)
    verdicts = judged(count, malicious=tuple(i for i in range(count) if i % 3))
    one, two, three = (read(media_type, wire.answer(media_type, HEAD, verdicts, batch)) for media_type in TYPES)
    assert one == two == three
    assert [line["index"] for line in one] == list(range(len(flows)))
    assert [line["flow_id"] for line in one if "rejected" not in line] == batch.flow_ids
    assert sum(len(line["reasons"]) for line in one if "rejected" not in line) == 2 * int(verdicts.malicious.sum())


def test_a_json_answer_has_the_head() -> None:
    answer = orjson.loads(wire.answer(JSON, HEAD, judged(3), mixed()))
    assert {name: value for name, value in answer.items() if name not in ("verdicts", "rejected")} == vars(HEAD)


@pytest.mark.parametrize("media_type", TYPES)
def test_absorbed_flows_have_no_verdicts_but_rejects(media_type: str) -> None:
    lines = read(media_type, wire.answer(media_type, HEAD, None, mixed()))
    assert [line["index"] for line in lines] == [0, 3, 5]
    assert all("rejected" in line for line in lines)
    assert read(media_type, wire.answer(media_type, HEAD, None, parse(BODIES[JSON], JSON))) == []


# The book of addresses


def test_a_flood_of_addresses_does_not_grow_the_book_nor_change_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_values.Book, "CAPACITY", 100)
    monkeypatch.setattr(_values, "_book", _values.Book(100))
    expected = parse(encode(JSON, [flow()]), JSON).columns.src_ip
    for block in range(4):
        flood = [flow(src_ip=f"10.1.{block}.{i}") for i in range(60)]
        batch = parse(encode(JSON, [*flood, flow()]), JSON)
        assert batch.rejected == []
        assert batch.columns.src_ip[-1:] == expected
        assert len(set(batch.columns.src_ip.tolist())) == 61
        assert len(_values._book.places) <= 100
    many = parse(encode(JSON, [flow(src_ip=f"10.2.{i // 200}.{i % 200}") for i in range(300)]), JSON)
    assert len(set(many.columns.src_ip.tolist())) == 300


@given(st.ip_addresses().map(str) | st.from_regex(r"[0-9a-f:.]{1,20}", fullmatch=True) | st.text(max_size=8))
@settings(max_examples=300, deadline=None)
def test_an_address_is_what_the_standard_library_calls_one(text: str) -> None:
    import ipaddress

    from flowsentry.flows.schema import is_address

    def parses(read: Callable[[str], Any]) -> bool:
        try:
            read(text)
        except ValueError:
            return False
        return True

    assert is_address(text) == parses(ipaddress.ip_address)
