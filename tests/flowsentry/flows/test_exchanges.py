from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsentry.flows import exchanges
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.schema import conform
from flowsentry.flows.sources import read
from flowsentry.simulation import SimulationSettings, simulate

SECOND = 1_000_000_000


def table(rows: list[dict[str, object]]) -> pd.DataFrame:
    usual: dict[str, object] = {
        "recording": "a", "file": "a.csv", "flow_id": "x", "final": True, "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2",
        "src_port": 40000, "dst_port": 80, "transport": "tcp", "bytes": 500, "time": 0, "duration": 1_000_000,
        "label": "benign",
    }  # fmt: skip
    frame = pd.DataFrame([{**usual, "row": i + 1, **row} for i, row in enumerate(rows)])
    frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
    return conform(frame)


def test_a_reply_belongs_to_the_exchange_that_it_answers() -> None:
    flows = table(
        [
            {},
            {"src_ip": "10.0.0.2", "dst_ip": "10.0.0.1", "src_port": 80, "dst_port": 40000, "time": 20},
            {"src_ip": "10.0.0.2", "dst_ip": "10.0.0.1", "src_port": 80, "dst_port": 40000, "time": 500},
        ]
    )
    assert exchanges.find(flows).tolist() == [0, 0, 1]


def test_a_translated_destination_is_the_same_exchange_only_close_in_time() -> None:
    service, pod = {"dst_ip": "10.96.0.1", "dst_port": 53}, {"dst_ip": "10.244.0.9", "dst_port": 5353}
    flows = table([service, pod, {**service, "time": 100}, {**pod, "time": 100}, {**pod, "src_port": 40001}])
    assert exchanges.find(flows).tolist() == [0, 0, 1, 1, 2]


def test_a_translated_source_is_the_same_exchange_if_the_edges_agree() -> None:
    pod = [{"time": 10 * i, "duration": 50_000 + 7_000 * i, "src_port": 50000 + i, "bytes": 132} for i in range(5)]
    node = [{**flow, "src_ip": "10.9.9.9", "src_port": 1024 + i, "bytes": 138} for i, flow in enumerate(pod)]
    assert exchanges.find(table(pod + node)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_two_clients_of_one_service_are_not_twins() -> None:
    many = [{"time": 10 * i, "duration": 200_000 + 3_000 * i, "src_port": 50000 + i} for i in range(40)]
    few = [{**flow, "src_ip": "10.9.9.9", "src_port": 1024} for flow in many[::8]]
    assert len(set(exchanges.find(table(many + few)).tolist())) == len(many) + len(few)


def test_a_node_port_is_the_same_exchange_on_both_sides() -> None:
    draw = np.random.default_rng(0)
    host = [
        {"time": 10 * (i // 20), "duration": int(d), "src_port": 50000 + i, "dst_port": 31301, "bytes": 356}
        for i, d in enumerate(draw.lognormal(15, 2, 60))
    ]
    pod = [
        {**flow, "src_ip": "10.9.9.9", "dst_ip": "10.244.0.3", "src_port": 1024 + i, "dst_port": 22}
        for i, flow in enumerate(host)
    ]
    found = exchanges.find(table(host + pod))
    assert found[:60].tolist() == found[60:].tolist()
    assert len(set(found.tolist())) == 60


def test_a_flood_and_a_steady_stream_of_probes_stay_as_many_exchanges_as_flows() -> None:
    flood = [{"src_port": 1024 + i, "bytes": 68, "duration": 0, "dst_ip": "10.0.0.9"} for i in range(500)]
    probes = [
        {"src_ip": f"10.0.1.{i % 2}", "dst_ip": f"10.0.2.{i % 2}", "src_port": 2000 + i, "dst_port": 8500,
         "bytes": 421, "time": 10 * (i // 2), "duration": 100_000 + (i * 7919) % 90_000}
        for i in range(200)
    ]  # fmt: skip
    assert len(set(exchanges.find(table(flood + probes)).tolist())) == 700


def test_recordings_and_flows_without_ports_share_nothing() -> None:
    ping = {"transport": "icmp", "src_port": None, "dst_port": None}
    pong = {**ping, "src_ip": "10.0.0.2", "dst_ip": "10.0.0.1"}
    flows = table([{}, {"recording": "b", "dst_ip": "10.0.0.7"}, ping, pong, {**ping, "dst_ip": "10.0.0.7"}])
    assert exchanges.find(flows).tolist() == [0, 1, 2, 3, 4]


def test_no_flows_have_no_exchange() -> None:
    assert exchanges.find(table([{}]).iloc[:0]).size == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "src_ip": st.sampled_from(["a", "b", "c"]),
                "dst_ip": st.sampled_from(["a", "b", "v"]),
                "src_port": st.sampled_from([1, 2, None]),
                "dst_port": st.sampled_from([1, 80]),
                "time": st.integers(0, 40),
                "bytes": st.sampled_from([68, 70, 500]),
                "duration": st.sampled_from([0, 10, SECOND]),
            }
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_flows_get_one_exchange_each_of_no_gap(rows: list[dict[str, object]]) -> None:
    found = exchanges.find(table(rows))
    assert found.size == len(rows)
    assert set(found.tolist()) == set(range(int(found.max()) + 1))


def pairs_within(*keys: pd.Series) -> int:
    sizes = pd.concat(keys, axis=1).value_counts()
    return int((sizes * (sizes - 1) // 2).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_derived_exchanges_agree_with_those_that_the_simulator_knows(seed: int) -> None:
    reports = simulate(SimulationSettings(seed=seed, minutes=60, episodes=1))
    flows = collapse(reports.assign(flow=identify(reports)))
    found = pd.Series(exchanges.find(flows), index=flows.index, name="found")
    together = pairs_within(flows["exchange"], found)
    assert together / pairs_within(flows["exchange"]) > 0.8
    assert together / pairs_within(found) > 0.9
    assert found.value_counts().max() <= exchanges.MOST_VIEWS


@pytest.fixture(scope="module")
def february(real_flows: Path) -> pd.DataFrame:
    flows = read([real_flows]).reports
    return flows.assign(exchange=exchanges.find(flows))


@pytest.mark.real_data
class TestFebruary2022:
    def test_ssh_flows_share_the_exchange_with_their_twin_behind_the_node_port(self, february: pd.DataFrame) -> None:
        malicious = february[february["label"] == "malicious"]
        pod = malicious[malicious["dst_port"] == 22]
        host = malicious[(malicious["dst_port"] == 31301)]
        heavy = host["src_ip"].isin(host.loc[host["bytes"] > 136, "src_ip"])
        assert heavy.sum() == 5270
        assert host.loc[heavy, "exchange"].isin(set(pod["exchange"])).mean() == pytest.approx(0.953, abs=0.005)
        flood = host[~heavy]
        assert len(flood) == flood["exchange"].nunique() == 16866
        assert not flood["exchange"].isin(set(february.drop(flood.index)["exchange"])).any()

    def test_shells_are_counted_once(self, february: pd.DataFrame) -> None:
        counts = february[february["dst_port"].isin([4444, 1337, 8081])].groupby("dst_port")["exchange"].nunique()
        assert counts.to_dict() == {4444: 324, 1337: 13, 8081: 2}

    def test_exchanges_are_small(self, february: pd.DataFrame) -> None:
        sizes = february["exchange"].value_counts()
        assert sizes.max() == 2
        assert len(sizes) == 39227
