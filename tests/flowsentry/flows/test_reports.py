import numpy as np
import pytest

from flowsentry.flows import reports as module
from flowsentry.flows.reports import FLOW_LIFETIME_TICKS, FlowMemory, clock_milliseconds, collapse, identify
from tests.flowsentry.tables import START, make_reports


def numbers(*rows):
    return identify(make_reports([{"flow_id": "a", **row} for row in rows])).tolist()


def test_reports_of_one_id_that_grow_are_one_flow():
    assert numbers({"bytes": 10, "duration": 1}, {"bytes": 20, "duration": 2}, {"bytes": 20, "duration": 2}) == [
        0,
        0,
        0,
    ]


def test_a_report_after_a_final_one_begins_a_new_flow():
    assert numbers({"final": True}, {}) == [0, 1]


@pytest.mark.parametrize("smaller", [{"bytes": 999}, {"duration": 999_999}])
def test_fewer_bytes_or_a_shorter_duration_begin_a_new_flow(smaller):
    assert numbers({}, smaller) == [0, 1]


def test_an_id_that_was_silent_for_more_than_an_hour_is_a_new_flow():
    assert numbers({"at": 0}, {"at": FLOW_LIFETIME_TICKS * 10}) == [0, 0]
    assert numbers({"at": 0}, {"at": FLOW_LIFETIME_TICKS * 10 + 10}) == [0, 1]


def test_flows_are_numbered_in_order_of_their_first_report():
    table = make_reports([{"flow_id": "b"}, {"flow_id": "a"}, {"flow_id": "b"}, {"flow_id": "c"}])
    assert identify(table).tolist() == [0, 1, 0, 2]


def test_the_same_id_in_two_recordings_is_two_flows():
    table = make_reports([{"flow_id": "a", "recording": "one"}, {"flow_id": "a", "recording": "two"}])
    assert identify(table).tolist() == [0, 1]


def test_more_flows_than_the_first_table_holds_keep_their_numbers():
    rows = [{"flow_id": f"flow-{i % 6000}", "at": i / 1000} for i in range(12000)]
    assert identify(make_reports(rows)).tolist() == [i % 6000 for i in range(12000)]


def test_the_longest_silent_flows_are_forgotten_at_the_most(monkeypatch):
    monkeypatch.setattr(module, "MAX_FLOWS", 1 << 12)
    rows = [{"flow_id": f"flow-{i}", "at": i / 10} for i in range(8000)]
    assert identify(make_reports([*rows, {"flow_id": "flow-7999", "at": 800}])).tolist()[-1] == 7999
    memory = FlowMemory()
    memory.keys[:] = np.arange(1, len(memory.keys) + 1, dtype=np.uint64)
    memory.flows[:, module.KEY_LAST] = np.arange(len(memory.keys)) // 16
    memory.make_room(300)
    assert len(memory.keys) == 1 << 12
    assert 0 < memory.used <= 1 << 11


def test_event_time_that_runs_backwards_is_clamped_to_the_clock():
    table = make_reports([{"at": 10}, {"at": 5}, {"at": 20}])
    begin = int(START.timestamp() * 1000)
    assert (clock_milliseconds(table["time"]) - begin).tolist() == [10_000, 10_000, 20_000]
    assert (clock_milliseconds(table["time"], begin + 15_000) - begin).tolist() == [15_000, 15_000, 20_000]


def test_collapse_keeps_the_last_report_the_count_and_the_first_time():
    table = make_reports(
        [{"flow_id": "a", "bytes": 1, "at": 0}, {"flow_id": "b", "at": 1}, {"flow_id": "a", "bytes": 5, "at": 30}]
    )
    table["flow"] = identify(table)
    flows = collapse(table)
    assert flows.index.tolist() == flows["flow"].tolist() == [0, 1]
    assert flows["bytes"].tolist() == [5, 1000]
    assert flows["reports"].tolist() == [2, 1]
    assert (flows["first_time"] - START).dt.total_seconds().tolist() == [0, 1]


def test_a_flow_is_malicious_if_any_of_its_reports_is():
    labels = {"a": ["malicious", "benign"], "b": ["benign", None], "c": [None, "malicious"], "d": ["malicious", None]}
    table = make_reports([{"flow_id": name, "label": label} for name in labels for label in labels[name]])
    table["flow"] = identify(table)
    flows = collapse(table)
    assert flows["label"].astype(object).fillna("missing").tolist() == [
        "malicious",
        "missing",
        "malicious",
        "malicious",
    ]
    assert flows["label"].dtype == table["label"].dtype


def test_no_reports_give_no_flows():
    table = make_reports([{}]).iloc[:0]
    table["flow"] = identify(table)
    assert len(collapse(table)) == 0
