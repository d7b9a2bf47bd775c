"""Validation: which rows are bad and why, the limit, and the page."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flowsentry.errors import ValidationFailed
from flowsentry.flows.expectations import TooManyBadRows, Validated, validate
from flowsentry.flows.schema import conform

ROWS = 60
NO_QUARANTINE = pd.DataFrame({"file": [], "row": [], "reason": [], "raw": []})


def reports(**changes: Any) -> pd.DataFrame:
    """Good reports of ten minutes; a change is a column, or a dict of values by place."""
    table = pd.DataFrame(
        {
            "recording": "day",
            "file": "day.csv",
            "row": np.arange(1, ROWS + 1),
            "flow_id": [f"f{i}" for i in range(ROWS)],
            "final": True,
            "src_ip": "10.0.0.1",
            "dst_ip": "fe80::1",
            "src_port": 40_000,
            "dst_port": 53,
            "transport": "udp",
            "bytes": 300,
            "time": pd.Timestamp("2026-01-02T03:00:00Z") + pd.to_timedelta(np.arange(ROWS) * 10, "s"),
            "duration": 1_000,
            "label": "benign",
        }
    )
    for name, change in changes.items():
        if not isinstance(change, dict):
            table[name] = change
        else:
            values = table[name].astype(object)
            for place, value in change.items():
                values.iloc[place] = value
            table[name] = values
    return conform(table)


def check(table: pd.DataFrame, limit: float = 1.0, aside: pd.DataFrame = NO_QUARANTINE) -> Validated:
    return validate(table, quarantined_at_load=aside, rows_read=len(table) + len(aside), max_quarantine_share=limit)


def test_good_rows_pass_unchanged() -> None:
    table = reports(transport={3: None}, src_port={3: None}, label={4: None})
    validated = check(table, 0.0)
    pd.testing.assert_frame_equal(validated.reports, table)
    assert validated.quarantine.empty
    assert validated.result["rows"] == {"read": ROWS, "good": ROWS, "quarantined": 0}
    assert all(expectation["success"] for expectation in validated.result["expectations"])


MISTAKES: tuple[tuple[str, Any, str], ...] = (
    ("src_port", 70_000, "src_port is not within 0..65535"),
    ("dst_port", -1, "dst_port is not within 0..65535"),
    ("bytes", -300, "bytes is not within 0..9007199254740992; bytes are not the sum of both directions"),
    ("bytes", 299, "bytes are not the sum of both directions"),
    ("packets", 9, "packets are not the sum of both directions"),
    ("duration", -1, "duration is not within 0..315360000000000000"),
    ("src_ip", "10.0.0.256", "src_ip is not an IPv4 or IPv6 address"),
    ("dst_ip", "db", "dst_ip is not an IPv4 or IPv6 address"),
    ("dst_ip", None, "dst_ip is missing"),
    ("flow_id", None, "flow_id is missing"),
    ("time", None, "time is missing"),
    ("transport", "quic", "transport is not known"),
    ("label", "odd", "label is not one of benign, malicious"),
    ("src_port", None, "a port is missing although transport is tcp or udp"),
    ("time", pd.Timestamp("2027-01-02T03:00:00Z"), "time is far from the rest of its recording"),
    ("time", pd.Timestamp("1970-01-01T00:00:00Z"), "time is far from the rest of its recording"),
    ("end", pd.Timestamp("2026-01-02T02:59:59Z"), "end is before start"),
)


def test_every_mistake_is_set_aside_with_its_place_and_reason_and_nothing_else_is() -> None:
    start = pd.Timestamp("2026-01-02T03:00:00Z")
    known = {"src_bytes": 100, "dst_bytes": 200, "packets": 3, "src_packets": 1, "dst_packets": 2}
    changes: dict[str, Any] = {}
    for place, (name, value, _) in enumerate(MISTAKES):
        changes.setdefault(name, {})[place] = value
    table = reports(**known, start=start, end=start)
    for name, values in changes.items():
        column = table[name].astype(object)
        column.iloc[list(values)] = list(values.values())
        table[name] = column
    table.loc[len(MISTAKES) :, ["src_bytes", "dst_packets", "end"]] = None
    validated = check(conform(table))
    set_aside = dict(zip(validated.quarantine["row"], validated.quarantine["reason"], strict=True))
    expected = {place + 1: "; ".join(sorted(reason.split("; "))) for place, (_, _, reason) in enumerate(MISTAKES)}
    assert set_aside == expected
    assert validated.reports["row"].tolist() == list(range(len(MISTAKES) + 1, ROWS + 1))
    assert set(validated.quarantine["file"]) == {"day.csv"}
    assert validated.quarantine["raw"].str.startswith('{"recording":"day","flow_id":').all()
    assert validated.result["bad_rows_by_reason"]["time is far from the rest of its recording"] == 2
    json.dumps(validated.result)


def test_a_row_that_is_there_twice_is_bad_both_times() -> None:
    validated = check(reports(row={7: 4}))
    assert validated.quarantine["row"].tolist() == [4, 4]
    assert set(validated.quarantine["reason"]) == {"the same row of a file is there more than once"}


def test_all_reasons_of_a_row_are_named_and_counted() -> None:
    validated = check(reports(bytes={7: -1, 9: -1}, transport={7: "odd"}))
    assert validated.quarantine["reason"].tolist() == [
        "bytes is not within 0..9007199254740992; transport is not known",
        "bytes is not within 0..9007199254740992",
    ]
    assert list(validated.result["bad_rows_by_reason"].values()) == [2, 1]


def test_time_is_judged_within_each_recording() -> None:
    late = reports(recording="later", file="later.csv", time=reports()["time"] + pd.Timedelta(days=300))
    assert check(conform(pd.concat([reports(), late])), 0.0).quarantine.empty


def test_rows_set_aside_while_reading_are_counted_and_come_first() -> None:
    aside = pd.DataFrame({"file": ["day.csv"], "row": [99], "reason": ["bytes is missing"], "raw": ["x,y"]})
    validated = check(reports(bytes={7: -1}), 0.05, aside)
    assert validated.quarantine["row"].tolist() == [99, 8]
    assert validated.result["rows"] == {"read": ROWS + 1, "good": ROWS - 1, "quarantined": 2}


def test_too_many_bad_rows_fail_with_reasons_counts_and_an_example_and_keep_the_quarantine() -> None:
    table = reports(bytes={7: -1, 9: -1}, transport={11: "odd"})
    with pytest.raises(TooManyBadRows) as caught:
        check(table, 0.04)
    message = str(caught.value)
    assert message.startswith("3 of 60 rows are bad (5.00%, limit 4.00%): bytes is not within 0..9007199254740992 (2,")
    assert "first at day.csv:8" in message
    assert "transport is not known (1, first at day.csv:12)" in message
    assert "\n" not in message
    assert len(caught.value.validated.quarantine) == 3
    assert len(check(table, 0.05).quarantine) == 3


def test_nothing_good_left_fails_whatever_the_limit() -> None:
    with pytest.raises(TooManyBadRows, match="60 of 60 rows are bad"):
        check(reports(bytes=-1))


def test_a_column_of_a_wrong_type_fails() -> None:
    with pytest.raises(ValidationFailed, match="column bytes is float64, not int64"):
        check(reports().astype({"bytes": "float64"}))


def test_lost_rows_are_noticed() -> None:
    with pytest.raises(ValueError, match="61 rows read are not 60"):
        validate(reports(), quarantined_at_load=NO_QUARANTINE, rows_read=61, max_quarantine_share=1.0)


def test_the_page_loads_nothing_and_shows_hostile_values_as_text() -> None:
    hostile = '</td></table><script src="https://evil.example/x.js"></script><img src=//evil.example/y>$column{{7*7}}'
    page = check(reports(transport={7: hostile}, bytes={9: -5})).page
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe|object|form)\b", page)
    assert not re.search(r"""<[^>]*\s(src|href|action|style)\s*=\s*["']?[^"'#]""", page)
    assert not re.search(r"url\(|@import", page)
    assert "&lt;script src=" in page
    assert "{{7*7}}" in page
    assert "unexpected values found" in page
    assert page.count("<div") == page.count("</div>")


@pytest.mark.real_data
def test_the_february_recording_is_good(real_flows: Any) -> None:
    from flowsentry.flows.sources import read

    loaded = read([real_flows])
    validated = check(loaded.reports, 0.0)
    assert len(validated.reports) == 47_367
