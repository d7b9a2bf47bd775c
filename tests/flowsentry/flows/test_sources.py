"""Reading flows: what the layouts mean, what is set aside, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowsentry.errors import SourceError
from flowsentry.flows.schema import BY_NAME, SCHEMA
from flowsentry.flows.sources import Loaded, read

COLUMNS = (
    "_source_flow_id",
    "_source_flow_final",
    "_source_source_ip",
    "_source_destination_ip",
    "_source_network_bytes",
    "_source_network_transport",
    "_source_@timestamp",
    "_source_event_duration",
    "_source_destination_port",
    "_source_source_port",
    "label",
)
GOOD = "EAT/////AP//AgoK,False,10.0.0.1,10.0.0.2,950151.0,tcp,2021-05-20T16:06:50.195Z,5098334271960,9200.0,35506.0,0"


def row(time: str = "2022-02-25T12:19:30.013Z", **changes: str) -> str:
    fields = {
        "flow_id": "a+/=1",
        "final": "True",
        "src_ip": "10.0.0.1",
        "dst_ip": "10.0.0.2",
        "bytes": "421",
        "transport": "tcp",
        "time": time,
        "duration": "126359",
        "dst_port": "8500.0",
        "src_port": "43226.0",
        "label": "benign",
    }
    return ",".join((fields | changes).values())


def text(*rows: str, header: Iterable[str] = COLUMNS) -> str:
    return "\n".join([",".join(header), *rows]) + "\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(content: str | bytes, name: str = "flows.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def only(loaded: Loaded) -> dict[str, Any]:
    assert loaded.rows_read == len(loaded.reports) == 1
    return dict(loaded.reports.iloc[0])


def reasons(loaded: Loaded) -> list[tuple[int, str]]:
    assert loaded.rows_read == len(loaded.reports) + len(loaded.quarantine)
    return list(loaded.quarantine[["row", "reason"]].itertuples(index=False, name=None))


def test_a_published_record_becomes_a_report_with_canonical_types(write: Callable[..., Path]) -> None:
    loaded = read([write(text(GOOD))])
    report = only(loaded)
    assert report == {
        "recording": "flows",
        "file": "flows.csv",
        "row": 1,
        "flow_id": "EAT/////AP//AgoK",
        "final": False,
        "src_ip": "10.0.0.1",
        "dst_ip": "10.0.0.2",
        "src_port": 35506,
        "dst_port": 9200,
        "transport": "tcp",
        "bytes": 950151,
        "time": pd.Timestamp("2021-05-20T16:06:50.195Z"),
        "duration": 5098334271960,
        "label": "benign",
    }
    assert all(loaded.reports[name].dtype == BY_NAME[name].dtype for name in report)
    assert loaded.reports["flow_id"].dtype.storage == "pyarrow"


@pytest.mark.parametrize(
    ("written", "label"), [("benign", "benign"), ("malicious", "malicious"), ("0", "benign"), ("1", "malicious")]
)
def test_labels_are_words_or_numbers(write: Callable[..., Path], written: str, label: str) -> None:
    assert only(read([write(text(row(label=written)))]))["label"] == label


def test_labels_may_be_absent_as_a_column_or_as_a_value(write: Callable[..., Path]) -> None:
    without = text(row().rsplit(",", 1)[0], header=COLUMNS[:-1])
    for content in (without, text(row(label=""))):
        loaded = read([write(content)])
        assert loaded.reports["label"].isna().all()
        assert loaded.reports["label"].dtype == "category"


def test_semicolons_and_packets_are_understood(write: Callable[..., Path]) -> None:
    header = ";".join([*COLUMNS[:5], "_source_network_packets", *COLUMNS[5:]])
    fields = row().split(",")
    loaded = read([write(header + "\n" + ";".join([*fields[:5], "7.0", *fields[5:]]) + "\n")])
    assert only(loaded)["packets"] == 7
    assert loaded.reports["packets"].dtype == "Int64"


def test_icmp_has_neither_ports_nor_transport_and_addresses_may_be_of_either_kind(
    write: Callable[..., Path],
) -> None:
    report = only(read([write(text(row(transport="", src_port="", dst_port="", src_ip="::1", dst_ip="fe80::2")))]))
    assert report["src_port"] is pd.NA
    assert report["dst_port"] is pd.NA
    assert pd.isna(report["transport"])
    assert (report["src_ip"], report["dst_ip"]) == ("::1", "fe80::2")


def test_quoted_fields_may_hold_the_delimiter_and_quotes(write: Callable[..., Path]) -> None:
    loaded = read([write(text('"' + '","'.join(row().split(",")) + '"', row(flow_id='"a,""b"""')))])
    assert loaded.reports["flow_id"].tolist() == ["a+/=1", 'a,"b"']


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(write: Callable[..., Path]) -> None:
    content = "\ufeff" + text(row(), row(label="malicious")).replace("\n", "\r\n")
    assert read([write(content)]).reports["label"].tolist() == ["benign", "malicious"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bytes": "many"}, "bytes is not a whole number"),
        ({"bytes": "1.5"}, "bytes is not a whole number"),
        ({"bytes": "1_000"}, "bytes is not a whole number"),
        ({"bytes": "99999999999999999999"}, "bytes is not a whole number"),
        ({"bytes": ""}, "bytes is missing"),
        ({"time": "yesterday"}, "time is not a timestamp"),
        ({"time": "infinity"}, "time is not a timestamp"),
        ({"time": "2022-13-25T12:19:30.013Z"}, "time is not a timestamp"),
        ({"time": "9022-02-25T12:19:30.013Z"}, "time is not a timestamp"),
        ({"duration": "1e6"}, "duration is not a whole number"),
        ({"src_port": "ssh"}, "src_port is not a whole number"),
        ({"final": "maybe"}, "final is not true or false"),
        ({"label": "odd"}, "label is not benign or malicious"),
        ({"flow_id": ""}, "flow_id is missing"),
        ({"transport": "tcp,udp"}, "wrong number of fields"),
        ({"transport": '"tcp'}, "quotes are not closed"),
    ],
)
def test_a_record_that_cannot_be_understood_is_set_aside_with_its_place_and_reason(
    write: Callable[..., Path], changes: dict[str, str], reason: str
) -> None:
    bad = row(**changes)
    loaded = read([write(text(row(), bad, row()))])
    assert loaded.quarantine.to_dict("records") == [{"file": "flows.csv", "row": 2, "reason": reason, "raw": bad}]
    assert loaded.reports["row"].tolist() == [1, 3]
    assert loaded.rows_read == 3


def test_rows_are_lines_so_that_empty_ones_count_but_are_no_records(write: Callable[..., Path]) -> None:
    loaded = read([write(text(row(), "", "x", row()) + "\n\n")])
    assert loaded.reports["row"].tolist() == [1, 4]
    assert reasons(loaded) == [(3, "wrong number of fields")]


def test_what_is_kept_of_a_bad_record_is_limited(write: Callable[..., Path]) -> None:
    loaded = read([write(text(row(), "y" * 2000))])
    assert loaded.quarantine["raw"].tolist() == ["y" * 500]


def test_row_numbers_hold_over_many_chunks(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowsentry.flows.sources._CHUNK_BYTES", 700)
    rows = [row(bytes=str(i) if i % 7 else "?") for i in range(1, 101)]
    loaded = read([write(text(*rows).rstrip("\n"))])
    assert loaded.quarantine["row"].tolist() == list(range(7, 101, 7))
    assert (loaded.reports["row"] == loaded.reports["bytes"]).all()
    assert loaded.rows_read == 100


def test_reports_are_in_order_of_time_and_ties_keep_the_order_of_the_file(write: Callable[..., Path]) -> None:
    second, first = "2022-02-25T12:19:31.000Z", "2022-02-25T14:19:30+02:00"
    loaded = read([write(text(row(second), row(first), row(second), row(first)))])
    assert loaded.reports["row"].tolist() == [2, 4, 1, 3]
    assert loaded.reports["time"].iloc[0] == pd.Timestamp("2022-02-25T12:19:30Z")


def test_a_folder_is_one_recording_and_several_entries_are_several(write: Callable[..., Path], tmp_path: Path) -> None:
    write(text(row("2022-02-25T12:00:02Z"), row("2022-02-25T12:00:04Z")), "days/a")
    write(text(row("2022-02-25T12:00:01Z"), row("2022-02-25T12:00:02Z")), "days/z.csv")
    write("# About these flows\n", "days/README.md")
    write(text(row())[:50], "days/.hidden.csv")
    write(text(row())[:50], "days/b.csv.part")
    other = write(gzip.compress(text(row()).encode()), "other/days.csv.gz")
    told: list[str] = []
    loaded = read([str(tmp_path / "days"), other], told.append)
    assert loaded.reports["recording"].tolist() == ["days"] * 4 + ["days-2"]
    assert loaded.reports["file"].tolist() == ["z.csv", "z.csv", "a", "a", "days.csv.gz"]
    assert list(loaded.files) == ["a", "z.csv", "days.csv.gz"]
    assert "README.md" in told[0]
    globbed = read([str(tmp_path / "d*" / "[az]*")])
    pd.testing.assert_frame_equal(globbed.reports.iloc[:, 1:], loaded.reports.iloc[:4, 1:], check_categorical=False)


def test_names_that_are_not_text_are_made_printable(write: Callable[..., Path]) -> None:
    path = write(text(row()), os.fsdecode(b"f\xff.csv"))
    assert only(read([path]))["file"] == r"f\udcff.csv"


def test_files_of_the_same_name_are_told_apart(write: Callable[..., Path]) -> None:
    one, other = write(text(row()), "a/flows.csv"), write(text(row()), "b/flows.csv")
    loaded = read([one, other])
    assert set(loaded.files) == {str(one), str(other)}
    assert not loaded.reports.duplicated(["file", "row"]).any()


def test_the_content_decides_whatever_the_name_says(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("flows.parquet", "flows.json", "x'; DROP TABLE y; --.csv", "a[1]*.csv"):
        assert only(read([write(text(row()), name)]))["bytes"] == 421
    assert only(read([write(gzip.compress(text(row()).encode()), "plain.csv")]))["bytes"] == 421


def test_digests_are_of_the_files_as_stored(write: Callable[..., Path]) -> None:
    path = write(text(row()))
    before = read([path]).files["flows.csv"]
    assert len(before) == 64
    write(text(row()) + "\n")
    assert read([path]).files["flows.csv"] != before


EVENT: dict[str, Any] = {
    "@timestamp": "2026-01-02T03:04:10.000Z",
    "event": {
        "dataset": "flow",
        "duration": 2500000000,
        "start": "2026-01-02T03:04:05.100Z",
        "end": "2026-01-02T03:04:07.600Z",
    },
    "flow": {"id": "EAwA", "final": True},
    "network": {"bytes": 300, "packets": 5, "transport": "tcp", "type": "ipv4"},
    "source": {"ip": "10.1.0.1", "port": 40000, "bytes": 100, "packets": 2},
    "destination": {"ip": "10.1.0.2", "port": 80, "bytes": 200, "packets": 3},
}


def dotted(event: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in event.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize("event", [EVENT, dotted(EVENT)], ids=["nested", "dotted"])
def test_packetbeat_flow_events_keep_what_they_know_of_both_directions(
    write: Callable[..., Path], event: dict[str, Any]
) -> None:
    report = only(read([write(json.dumps(event) + "\n")]))
    assert (report["flow_id"], report["final"], report["duration"]) == ("EAwA", True, 2_500_000_000)
    assert (report["src_ip"], report["src_port"], report["dst_ip"], report["dst_port"]) == (
        "10.1.0.1",
        40000,
        "10.1.0.2",
        80,
    )
    sizes = ["bytes", "packets", "src_bytes", "src_packets", "dst_bytes", "dst_packets"]
    assert [report[name] for name in sizes] == [300, 5, 100, 2, 200, 3]
    assert report["start"] == pd.Timestamp("2026-01-02T03:04:05.1Z")
    assert report["end"] == pd.Timestamp("2026-01-02T03:04:07.6Z")
    assert pd.isna(report["label"])
    assert "src_workload" not in report


def test_packetbeat_events_may_name_the_workloads_and_list_tunnelled_addresses(write: Callable[..., Path]) -> None:
    source = EVENT["source"] | {"ip": ["1.1.1.1", "10.1.0.9"]}
    source["kubernetes"] = {"namespace": "shop", "deployment": {"name": "web"}, "pod": {"name": "web-1"}}
    report = only(read([write(json.dumps(EVENT | {"source": source, "label": "malicious"}))]))
    assert report["src_workload"] == "shop/web"
    assert report["src_ip"] == "10.1.0.9"
    assert report["label"] == "malicious"


def test_packetbeat_totals_are_summed_where_only_the_directions_are_known(write: Callable[..., Path]) -> None:
    destination = {"ip": "10.1.0.2"}
    event = EVENT | {"network": {"type": "ipv4"}, "destination": destination}
    report = only(read([write(json.dumps(event))]))
    assert (report["bytes"], report["packets"]) == (100, 2)
    assert report["dst_port"] is pd.NA


def test_lines_that_are_no_flow_events_are_set_aside(write: Callable[..., Path]) -> None:
    dns = {"@timestamp": "2026-01-02T03:04:10.000Z", "type": "dns"}
    wrong = EVENT | {"event": {"duration": "long"}}
    lines = [json.dumps(dns), json.dumps(EVENT), "{broken", "[1]", json.dumps(wrong), "[" * 5000]
    assert reasons(read([write("\n".join(lines))])) == [
        (1, "not a flow event"),
        (3, "not a JSON object"),
        (4, "not a JSON object"),
        (5, "duration is not a whole number"),
        (6, "not a JSON object"),
    ]


def test_canonical_parquet_comes_back_as_it_was_written(write: Callable[..., Path], tmp_path: Path) -> None:
    reports = read([write(text(row(), row(label="malicious", src_port="", transport="")))]).reports
    reports["packets"] = pd.array([1, None], "Int64")
    reports["family"] = pd.Categorical([None, "flood"])
    reports["exchange"] = np.array([40, 7])
    reports["corrected"] = reports["label"]
    path = tmp_path / "flows.parquet"
    reports.to_parquet(path)
    again = read([path])
    expected = reports.drop(columns="corrected").assign(file=pd.Categorical(["flows.parquet"] * 2))
    pd.testing.assert_frame_equal(again.reports, expected[again.reports.columns], check_categorical=False)
    twice = read([path, shutil.copy(path, tmp_path / "more.parquet")]).reports
    assert twice["exchange"].tolist() == [1, 0, 3, 2]
    mixed = read([path, write(text(row()))]).reports
    assert "exchange" not in mixed
    assert mixed["packets"].isna().tolist() == [False, True, True]
    assert [c.name for c in SCHEMA if c.name in mixed] == list(mixed)


def test_published_columns_in_parquet_are_the_published_layout(write: Callable[..., Path], tmp_path: Path) -> None:
    table = pd.read_csv(write(text(row(), row(src_port="", label="malicious"), row(time="never"))))
    path = tmp_path / "published.parquet"
    table.to_parquet(path)
    loaded = read([path])
    expected = read([tmp_path / "flows.csv"])
    pd.testing.assert_frame_equal(
        loaded.reports.drop(columns=["recording", "file"]),
        expected.reports.drop(columns=["recording", "file"]),
        check_categorical=False,
    )
    assert reasons(loaded) == [(3, "time is not a timestamp")]
    assert '"never"' in loaded.quarantine["raw"].item()


def refused(entry: Path | str, *more: Path | str) -> str:
    with pytest.raises(SourceError) as caught:
        read([entry, *more])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.csv does not exist" in refused(tmp_path / "nowhere.csv")
    assert "matches no file" in refused(str(tmp_path / "*.csv"))
    for nothing in ([], [""]):
        with pytest.raises(SourceError, match="no data given"):
            read(nothing)


def test_a_folder_without_flows_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no file with flows" in refused(tmp_path / "empty")
    write("hello\n", "docs/README")
    assert "has no file with flows" in refused(tmp_path / "docs")


def test_wrong_columns_are_named_with_the_nearest_found(write: Callable[..., Path]) -> None:
    header = ["_source_netwrk_bytes" if name == "_source_network_bytes" else name for name in COLUMNS]
    message = refused(write(text(row(), header=header)))
    assert "missing _source_network_bytes (nearest found: _source_netwrk_bytes)" in message
    assert "missing _source_flow_id" in refused(write("time,price\n1,2\n"))
    event = EVENT | {"flow": {"ident": "x"}}
    assert "flow.id (nearest found: flow.ident)" in refused(write(json.dumps(event)))


def test_wrong_parquet_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pd.DataFrame({"flow_id": ["a"], "sourc_ip": ["b"]}).to_parquet(path)
    assert "src_ip (nearest found: sourc_ip)" in refused(path)


def test_a_column_given_twice_is_refused(write: Callable[..., Path]) -> None:
    assert "label is there twice" in refused(write(text(row() + ",benign", header=[*COLUMNS, "label"])))


def test_an_empty_file_is_refused(write: Callable[..., Path]) -> None:
    assert "is empty" in refused(write(""))
    assert "is empty" in refused(write(gzip.compress(b"")))


def test_a_header_without_rows_is_refused(write: Callable[..., Path]) -> None:
    assert "no rows" in refused(write(text()))
    assert "no rows" in refused(write(text() + "\n \n"))


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_gzip_is_refused(write: Callable[..., Path], keep: float) -> None:
    rng = np.random.default_rng(0)
    packed = gzip.compress(text(*(row(bytes=str(n)) for n in rng.integers(1 << 40, size=2000))).encode())
    assert "truncated gzip" in refused(write(packed[: int(len(packed) * keep)]))


def test_a_corrupted_gzip_is_refused(write: Callable[..., Path]) -> None:
    packed = bytearray(gzip.compress(text(row(), row()).encode()))
    packed[-6] ^= 255
    assert "damaged or truncated gzip" in refused(write(bytes(packed)))


@pytest.mark.parametrize("magic", [b"", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"])
def test_binary_garbage_is_refused(write: Callable[..., Path], magic: bytes) -> None:
    assert "is binary" in refused(write(magic + np.random.default_rng(1).bytes(5000)))


def test_damaged_parquet_is_refused(write: Callable[..., Path]) -> None:
    assert "damaged Parquet" in refused(write(b"PAR1" + b"\0" * 400 + b"PAR1"))


def test_text_in_another_encoding_is_refused_with_its_line(write: Callable[..., Path]) -> None:
    latin = text(row(), row(flow_id="é")).encode("latin-1")
    assert "is not UTF-8: byte 0xe9 in line 3" in refused(write(latin))
    late = text(*[row()] * 12000).encode() + row(flow_id="é").encode("latin-1")
    assert "is not UTF-8: byte 0xe9 in line 12002" in refused(write(late))
    assert "is not UTF-8" in refused(write(text(row()).encode("utf-16")))


def test_a_huge_field_is_refused_with_its_line(write: Callable[..., Path]) -> None:
    assert "line 3 is longer than 1 MiB" in refused(write(text(row(), row(flow_id="x" * (1 << 21)), row())))
    assert "line 1 is longer than 1 MiB" in refused(write("x" * (3 << 20)))
    huge = json.dumps(EVENT) + "\n" + json.dumps(EVENT | {"note": "x" * (1 << 21)})
    assert "line 2 is longer than 1 MiB" in refused(write(huge))


def test_mixed_layouts_in_one_recording_are_refused_with_both_files(write: Callable[..., Path], tmp_path: Path) -> None:
    write(text(row()), "mix/a.csv")
    write(text(row()).replace(",", ";"), "mix/b.csv")
    message = refused(tmp_path / "mix")
    assert "mixes layouts: a.csv" in message
    assert "b.csv" in message
    write(json.dumps(EVENT), "mix/b.csv")
    assert "b.csv is Packetbeat NDJSON" in refused(tmp_path / "mix")
    write(text(row().rsplit(",", 1)[0], header=COLUMNS[:-1]), "mix/b.csv")
    assert "only one of them has label" in refused(tmp_path / "mix")


def test_a_file_given_twice_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(text(row()))
    assert "given twice" in refused(path, tmp_path)


def test_something_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")


def test_a_file_without_permission_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(text(row()))
    path.chmod(0)
    me = os.geteuid()
    try:
        os.seteuid(me or 65534)
        message = refused(path)
    finally:
        os.seteuid(me)
    assert "flows.csv cannot be read: permission denied" in message


def test_pretty_printed_json_is_refused(write: Callable[..., Path]) -> None:
    assert "one event to a line" in refused(write(json.dumps(EVENT, indent=1)))


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60) | st.sampled_from(
    [row(), row(bytes="x"), ";" * 10, "," * 10]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=8))
def test_every_line_ends_up_in_exactly_one_place(write: Callable[..., Path], lines: list[str]) -> None:
    content = text(row(), *lines)
    loaded = read([write(content)])
    rows = [number for number, line in enumerate(content.split("\n")[1:], 1) if line.rstrip("\r")]
    assert sorted([*loaded.reports["row"], *loaded.quarantine["row"]]) == rows
    assert loaded.rows_read == len(rows)


@pytest.mark.parametrize("depth", [1_000, 90_000])
def test_deeply_nested_json_is_only_a_bad_record(write: Callable[..., Path], depth: int) -> None:
    bomb = '{"source":' * depth + "1" + "}" * depth
    assert reasons(read([write(f"{bomb}\n{json.dumps(EVENT)}\n")])) == [(1, "not a flow event")]


@pytest.mark.real_data
def test_the_february_recording_is_read_whole(real_flows: Path) -> None:
    loaded = read([real_flows])
    assert loaded.rows_read == len(loaded.reports) == 47_367
    assert loaded.reports["label"].value_counts().to_dict() == {"malicious": 28_199, "benign": 19_168}
    assert loaded.reports["time"].is_monotonic_increasing
    assert (loaded.reports["row"] == np.arange(1, 47_368)).all()


@pytest.mark.real_data
def test_the_published_may_sample_is_read_whole(may_sample: Path) -> None:
    loaded = read([may_sample])
    assert len(loaded.reports) == 100
    assert loaded.reports["label"].eq("benign").all()
