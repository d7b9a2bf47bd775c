"""The kernel against a naive reading of its definition, and against itself in other batches."""

import io
import itertools
import zipfile
from collections import Counter, defaultdict
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsentry.errors import StoreError
from flowsentry.features import kernel
from flowsentry.features.kernel import FEATURES, Stream
from flowsentry.flows.columns import Columns
from flowsentry.flows.reports import identify
from flowsentry.flows.schema import BY_NAME
from tests.flowsentry.tables import START, make_reports

MINUTE = 60


def features(rows):
    """One dictionary of features per report."""
    values = advance(Stream(), make_reports(rows)).features
    return [dict(zip(FEATURES, row.tolist(), strict=True)) for row in values]


def advance(stream, table):
    return stream.advance(Columns.of(table))


def naive(rows):
    """Every feature of flows with one report each, from the whole history, by definition."""
    start = int(START.timestamp()) // 10
    first_tick = start + int(rows[0]["at"]) // 10
    endpoint_counts, history, result = Counter(), [], []
    before, trusted_until = 0, kernel.WARM_UP_TICKS
    for row in rows:
        tick = start + int(row["at"]) // 10
        age = tick - first_tick
        if before < trusted_until:
            trusted_until += max(0, age - before - kernel.LONGEST_STEP_TICKS)
        before = age
        source, target = (row["src_ip"], row["src_port"]), (row["dst_ip"], row["dst_port"])
        endpoint_counts[source] += 1
        endpoint_counts[target] += 1
        obvious = row["src_port"] >= 32768 > row["dst_port"]
        turned = endpoint_counts[source] > endpoint_counts[target] and not obvious
        service, client = (source, row["dst_ip"]) if turned else (target, row["src_ip"])
        keys = {"service": service, "client": client, "edge": (client, service)}
        failed = row["bytes"] <= 400
        flow = {"tick": tick, "keys": keys, "failed": failed, "bytes": row["bytes"], "learned": {}, "peaks": {}}
        history.append(flow)

        def about(kind, keys=keys):
            return [old for old in history if old["keys"][kind] == keys[kind]]

        def recent(kind, ticks, failures=False, *, tick=tick, about=about):
            return [o for o in about(kind) if o["tick"] > tick - ticks and (o["failed"] or not failures)]

        horizon = max(min(age, trusted_until), age - kernel.LAG_TICKS) // 30
        base = {}
        for kind in keys:
            learned = [
                o for o in about(kind)[:-1] if o["learned"].get(kind) and (o["tick"] - first_tick) // 30 < horizon
            ]
            peaks = [o["peaks"][kind] for o in learned]
            base[kind] = (len(learned), *(np.max(peaks, axis=0) if peaks else (0, 0, 0)))
        new = {kind: base[kind][0] == 0 for kind in keys}
        counts = {
            kind: (
                len(recent(kind, 6)),
                len(recent(kind, 6, True)),
                float(sum(o["bytes"] for o in recent(kind, 6))) if kind == "edge" else 0.0,
            )
            for kind in keys
        }
        own = float(failed)
        own_or_new = float(failed or new["edge"])
        edges = defaultdict(list)
        for old in about("client"):
            edges[old["keys"]["edge"]].append(old)
        fresh = [e for e in edges.values() if e[0].get("was_new", new["edge"]) and e[0]["tick"] > tick - 30]
        only_failed = [e for e in fresh if e[0]["failed"] and all(o["failed"] for o in e)]
        if len(edges[keys["edge"]]) == 1:
            flow["was_new"] = new["edge"]
        answered = any(not o["failed"] for o in about("edge"))
        dead = {kind: sum(o["failed"] for o in about(kind)) for kind in keys}
        never = {kind: all(o["failed"] for o in about(kind)) for kind in keys}
        expected = {
            "no_payload": own,
            "edge_new": float(new["edge"]),
            "service_new": float(new["service"]),
            "edge_fails_10s": len(recent("edge", 1, True)),
            "edge_fails_60s": counts["edge"][1],
            "edge_fails_300s": len(recent("edge", 30, True)),
            "service_fails_60s": own * counts["service"][1],
            "client_fails_60s": own * counts["client"][1],
            "edge_fail_burst": counts["edge"][1] / max(1, base["edge"][2]),
            "service_fail_burst": own * counts["service"][1] / max(1, base["service"][2]),
            "client_fail_burst": own * counts["client"][1] / max(1, base["client"][2]),
            "edge_burst": counts["edge"][0] / max(1, base["edge"][1]),
            "service_burst": own_or_new * counts["service"][0] / max(1, base["service"][1]),
            "client_burst": own_or_new * counts["client"][0] / max(1, base["client"][1]),
            "edge_fail_share": len(recent("edge", 30, True)) / len(recent("edge", 30)),
            "service_fail_share": own * len(recent("service", 30, True)) / len(recent("service", 30)),
            "client_failed_edges": len(only_failed) if new["edge"] and failed and not answered else 0,
            "client_new_edges": len(fresh) if new["edge"] else 0,
            "service_dead": dead["service"] if new["service"] and never["service"] else 0,
            "edge_dead": dead["edge"] if new["edge"] and never["edge"] else 0,
            "edge_bytes_burst": counts["edge"][2] / max(1e6, base["edge"][3]),
            "edge_persistence": len({o["tick"] for o in recent("edge", 30)}) if new["edge"] else 0,
        }
        marked = any(expected[FEATURES[feature]] >= limit for feature, limit in kernel.MARKS)
        trusted = age < trusted_until
        for kind in keys:
            allowed = trusted or kind == "client" or not never[kind]
            flow["learned"][kind] = allowed and (trusted or not marked)
            flow["peaks"][kind] = counts[kind]
        result.append(expected)
    return result


@st.composite
def conversations(draw):
    """Up to 60 flows of a tiny world within half an hour of silence between any two, over up to 100 minutes."""
    hosts, ports = ["10.0.0.1", "10.0.0.2", "10.0.0.3"], [80, 22, 40000, 50000]
    at, rows = 0.0, []
    for _ in range(draw(st.integers(1, 60))):
        at += draw(st.sampled_from([0, 0, 0, 1, 9, 10, 30, 200, 600, 1200]))
        rows.append(
            {
                "at": at,
                "src_ip": draw(st.sampled_from(hosts)),
                "dst_ip": draw(st.sampled_from(hosts)),
                "src_port": draw(st.sampled_from(ports)),
                "dst_port": draw(st.sampled_from(ports)),
                "bytes": draw(st.sampled_from([60, 400, 401, 2_000_000])),
            }
        )
    return rows


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_features_equal_their_definition(rows):
    # The naive reading never forgets.
    rows = [row for row in rows if row["at"] <= rows[0]["at"] + kernel.LIFETIME_TICKS * 10]
    for number, (got, expected) in enumerate(zip(features(rows), naive(rows), strict=True)):
        for name in FEATURES:
            assert got[name] == pytest.approx(expected[name], rel=1e-6), (number, name)


@st.composite
def report_streams(draw):
    rows, at = [], 0.0
    for _ in range(draw(st.integers(1, 80))):
        at += draw(st.sampled_from([-20, 0, 0, 1, 10, 60, 400, 2000, 4000]))
        rows.append(
            {
                "at": at,
                "flow_id": draw(st.sampled_from(["a", "b", "c", "d", "e"])),
                "src_ip": draw(st.sampled_from(["10.0.0.1", "10.0.0.2", "::"])),
                "dst_ip": draw(st.sampled_from(["10.0.0.3", "10.0.0.4"])),
                "src_port": draw(st.sampled_from([None, 80, 40000])),
                "dst_port": draw(st.sampled_from([None, 80, 40000])),
                "transport": draw(st.sampled_from(["tcp", "udp", None])),
                "bytes": draw(st.sampled_from([60, 500, 1_500_000])),
                "duration": draw(st.integers(0, 3)),
                "final": draw(st.booleans()),
            }
        )
    return rows


@settings(max_examples=100, deadline=None)
@given(report_streams(), st.lists(st.integers(0, 80), max_size=5), st.booleans())
def test_any_batching_and_a_restart_between_batches_give_the_same_bits(rows, cuts, restart):
    table = make_reports(rows)
    whole = judged(Stream(), table)
    stream, parts = Stream(), []
    bounds = sorted({0, len(table), *(cut for cut in cuts if cut < len(table))})
    for begin, end in itertools.pairwise(bounds):
        parts.append(judged(stream, table.iloc[begin:end]))
        if restart:
            stream = Stream.load(stream.snapshot("a judge").to_bytes(), "a judge")
    assert stream.seen == len(table)
    for field in fields(whole):
        assert np.concatenate([getattr(part, field.name) for part in parts]).tobytes() == (
            getattr(whole, field.name).tobytes()
        ), field.name


def judged(stream, table):
    return stream.advance(Columns.of(table), lambda rows: rows.sum(axis=1, dtype=np.float64), limit=6.0)


@settings(max_examples=50, deadline=None)
@given(report_streams())
def test_a_flow_is_numbered_as_in_a_flow_table_and_keeps_its_worst_score(rows):
    table = make_reports(rows)
    stream = Stream()
    got = judged(stream, table)
    assert got.flow.tolist() == identify(table).tolist()
    scores = got.features.sum(axis=1, dtype=np.float64)
    worst, alarm = {}, {}
    for i, flow in enumerate(got.flow.tolist()):
        worst[flow] = max(worst.get(flow, -np.inf), scores[i])
        if worst[flow] >= 6 and flow not in alarm:
            alarm[flow] = got.clock[i]
        assert got.worst[i] == worst[flow]
        assert got.first_alarm[i] == alarm.get(flow, 0)


def test_another_judge_begins_without_worst_scores_but_with_the_same_stream():
    rows = [{"flow_id": "a", "bytes": 60, "duration": n, "at": n * 10} for n in range(2)]
    table = make_reports(rows)
    stream = Stream()
    judged(stream, table.iloc[:1])
    content = stream.snapshot("one").to_bytes()
    same, other = (
        Stream.load(content, by).advance(Columns.of(table.iloc[1:]), lambda rows: np.zeros(len(rows)))
        for by in ("one", "two")
    )
    assert same.worst[0] > 0
    assert other.worst[0] == 0
    assert same.flow[0] == other.flow[0] == 0
    assert same.features.tobytes() == other.features.tobytes()


def test_a_snapshot_does_not_change_with_the_stream():
    stream = Stream()
    table = make_reports([{"src_port": 40000 + i, "at": i} for i in range(50)])
    advance(stream, table.iloc[:20])
    snapshot, content = stream.snapshot(), stream.snapshot().to_bytes()
    advance(stream, table.iloc[20:])
    assert snapshot.to_bytes() == content
    assert Stream.load(content).seen == 20


def test_later_reports_count_their_flow_once_and_add_bytes_by_difference():
    rows = [{"flow_id": "a", "bytes": size, "duration": n, "at": n * 10} for n, size in enumerate([10**6, 3 * 10**6])]
    first, second = features(rows)
    assert (first["edge_burst"], second["edge_burst"]) == (1, 1)
    assert (first["edge_bytes_burst"], second["edge_bytes_burst"]) == (1, 3)


def test_a_flow_that_carries_something_in_a_later_report_takes_its_failure_back():
    rows = [
        {"flow_id": "a", "bytes": 60, "duration": 1, "at": 0},
        {"flow_id": "a", "bytes": 5000, "duration": 2, "at": 10},
        {"flow_id": "b", "bytes": 60, "at": 20},
    ]
    first, second, third = features(rows)
    assert (first["edge_fails_60s"], second["edge_fails_60s"], third["edge_fails_60s"]) == (1, 0, 1)
    assert (first["client_failed_edges"], second["client_failed_edges"]) == (1, 0)
    assert third["service_dead"] == 0


def test_packets_decide_where_the_source_counts_them():
    rows = [{"bytes": 700}, {"bytes": 300}]
    table = make_reports(rows)
    table["packets"] = np.array([10, 1])
    table["packets"] = table["packets"].astype(BY_NAME["packets"].dtype)
    values = advance(Stream(), table).features
    assert values[:, 0].tolist() == [1, 0]


def test_only_tcp_can_fail():
    got = features([{"transport": name, "bytes": 60} for name in ("tcp", "udp", "icmp", None)])
    assert [row["no_payload"] for row in got] == [1, 0, 0, 0]


def test_a_service_seen_in_more_flows_is_the_service_whichever_way_it_is_reported():
    rows = [{"src_ip": f"10.0.1.{i}", "src_port": 3000 + i, "dst_port": 8000} for i in range(5)]
    rows.append({"src_ip": "10.0.0.2", "src_port": 8000, "dst_ip": "10.0.1.9", "dst_port": 3999})
    turned = advance(Stream(), make_reports(rows)).is_reversed
    assert turned.tolist() == [False] * 5 + [True]


def test_a_scanner_with_one_source_port_is_not_taken_for_a_service():
    rows = [{"at": i / 10, "src_port": 45000, "dst_port": 1 + i, "bytes": 60} for i in range(50)]
    turned = advance(Stream(), make_reports(rows)).is_reversed
    assert not turned.any()
    assert features(rows)[-1]["client_failed_edges"] == 50


def test_what_an_edge_does_becomes_normal_only_after_the_lag():
    warm = [{"at": i * 60, "dst_ip": "10.0.0.9"} for i in range(31)]
    later = [{"at": 31 * MINUTE + i * 60} for i in range(61)]
    new = [row["edge_new"] for row in features([*warm, *later])][31:]
    learned_after = new.index(0.0)
    assert 30 <= learned_after <= 36
    assert all(new[:learned_after])


def test_a_burst_never_becomes_normal():
    warm = [{"at": i * 60} for i in range(31)]
    attack = [{"at": 31 * MINUTE + i / 2, "bytes": 60, "src_ip": "10.0.0.66"} for i in range(7200)]
    got = features([*warm, *attack])
    assert got[-1]["edge_fail_burst"] > 50


def test_a_service_that_never_answers_stays_new():
    warm = [{"at": i * 60} for i in range(31)]
    beacon = [{"at": 31 * MINUTE + i * 60, "bytes": 60, "dst_ip": "10.9.9.9", "dst_port": 4444} for i in range(90)]
    assert features([*warm, *beacon])[-1]["service_dead"] == 90


def test_memory_is_bounded_under_a_spoofed_flood(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_ENTITIES", 1 << 12)
    monkeypatch.setattr(kernel, "MAX_ENDPOINTS", 1 << 13)
    rows = [{"at": i / 100, "src_ip": f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", "bytes": 60} for i in range(20_000)]
    stream = Stream()
    advance(stream, make_reports(rows))
    assert len(stream._entities.keys) == 1 << 12
    assert len(stream._endpoints.keys) <= 1 << 13


def test_an_empty_batch_changes_nothing():
    stream = Stream()
    values = advance(stream, make_reports([{}]).iloc[:0]).features
    assert values.shape == (0, len(FEATURES))
    assert stream.seen == 0


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 broken"])
def test_a_damaged_checkpoint_is_refused(content):
    with pytest.raises(StoreError, match="not a readable checkpoint"):
        Stream.load(content)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("entity_counters", lambda array: array[:, :1]),
        ("entity_rings", lambda array: array.astype("float64")),
        ("flow_keys", np.zeros_like),
        ("endpoint_keys", lambda array: array[:1].repeat(len(array))),
        ("header", lambda array: np.frombuffer(array.tobytes().replace(b"4096, 4096]", b"4096, 1000]"), np.uint8)),
        ("header", lambda array: np.frombuffer(array.tobytes().replace(b"4096, 4096]", b"4096, 2]"), np.uint8)),
        ("header", lambda array: np.frombuffer(array.tobytes().replace(b"[4096", b"[1125899906842624"), np.uint8)),
        (
            "header",
            lambda array: np.frombuffer(array.tobytes().replace(b'"begin": ', b'"begin": "x", "b": '), np.uint8),
        ),
        ("header", lambda array: np.frombuffer(array.tobytes().replace(b'"seen": 5', b'"seen": Infinity'), np.uint8)),
        ("header", lambda array: np.frombuffer(b"[" * 100_000, np.uint8)),
    ],
)
def test_a_checkpoint_that_compiled_code_could_not_trust_is_refused(name, change):
    stream = Stream()
    advance(stream, make_reports([{"src_port": 40000 + i} for i in range(5)]))
    arrays = stream.snapshot().arrays
    changed = change(arrays[name])
    assert changed.tobytes() != arrays[name].tobytes()
    with pytest.raises(StoreError, match="not a readable checkpoint"):
        Stream.load(kernel.Snapshot(arrays | {name: changed}).to_bytes())


def test_a_small_checkpoint_cannot_fill_the_memory():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a", "b"):
            archive.writestr(name, bytes(1 << 29))
    assert len(content.getvalue()) < 2 << 20
    with pytest.raises(StoreError, match="more than a stream can hold"):
        Stream.load(content.getvalue())


@pytest.mark.parametrize("pause", [61 * MINUTE, 20 * 60 * MINUTE])
def test_an_edge_that_answers_once_in_a_while_becomes_normal(pause):
    got = features([{"at": i * pause} for i in range(4)])
    assert [row["edge_new"] for row in got] == [1, 0, 0, 0]


def test_an_edge_that_was_silent_for_more_than_a_day_is_new_again():
    assert [row["edge_new"] for row in features([{"at": 0}, {"at": 25 * 60 * MINUTE}])] == [1, 1]


def test_a_failure_is_forgotten_after_an_hour():
    beacon = {"dst_port": 4444, "bytes": 60}
    warm = [{"at": i * 60} for i in range(31)]
    got = features(
        [*warm, {"at": 31 * MINUTE, **beacon}, {"at": 50 * MINUTE, **beacon}, {"at": 200 * MINUTE, **beacon}]
    )
    assert [row["service_dead"] for row in got[-3:]] == [1, 2, 1]


def test_a_checkpoint_of_another_kernel_is_refused(monkeypatch):
    content = Stream().snapshot().to_bytes()
    monkeypatch.setattr(kernel, "KERNEL_VERSION", "99")
    with pytest.raises(StoreError, match="kernel version 2, this is 99"):
        Stream.load(content)


def test_one_report_with_an_old_time_does_not_end_the_warm_up():
    rows = [{"at": -40 * 365 * 86_400}, *({"at": 10 * n} for n in range(200))]
    warm = advance(Stream(), make_reports(rows)).warm
    assert not warm[:181].any()
    assert warm[182:].all()


def test_a_gap_counts_little_towards_the_warm_up():
    steps = [0, 10, 3600, 3610, *range(3620, 3620 + 10 * 200, 10)]
    warm = advance(Stream(), make_reports([{"at": at} for at in steps])).warm
    first = steps[int(np.argmax(warm))]
    assert first == 10 + 3600 - 10 + 30 * MINUTE - 300 - 10


@pytest.mark.parametrize(("silence", "still_warm"), [(20 * 60 * MINUTE, True), (25 * 60 * MINUTE, False)])
def test_a_stream_that_was_silent_for_more_than_a_day_warms_up_again(silence, still_warm):
    rows = [{"at": 10 * n} for n in range(200)]
    stream = Stream()
    advance(stream, make_reports(rows))
    assert stream.warm
    assert advance(stream, make_reports([{"at": 1990 + silence}])).warm.tolist() == [still_warm]
    assert stream.warm == still_warm
