from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flowsentry.flows.labels import derive
from flowsentry.flows.places import PLACES, places
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.sources import read


def flows(rows: list[dict[str, object]]) -> pd.DataFrame:
    usual: dict[str, object] = {
        "recording": "a", "src_ip": "c", "dst_ip": "web", "src_port": 40000, "dst_port": 80, "seconds": 0,
        "corrected": "benign", "family": None, "episode": None, "hard_negative": None,
    }  # fmt: skip
    table = pd.DataFrame([{**usual, **row} for row in rows])
    table["time"] = pd.Timestamp("2024-01-01T00:00:00Z") + pd.to_timedelta(table.pop("seconds"), unit="s")
    return table.assign(label=table["corrected"])


ATTACK = {"corrected": "malicious", "family": "flood", "src_ip": "evil", "dst_ip": "ssh", "dst_port": 22}


def test_malicious_and_unlabelled_flows_have_no_place() -> None:
    found = places(flows([ATTACK, {}, {"corrected": None}]))
    assert found.isna().tolist() == [True, False, True]
    assert tuple(found.cat.categories) == PLACES


def test_the_attacked_service_is_a_victim_and_its_other_ports_are_not() -> None:
    attacks = [{**ATTACK, "src_port": 1000 + i} for i in range(3)]
    benign = [
        {"dst_ip": "ssh", "dst_port": 22, "seconds": 9000},
        {"dst_ip": "c", "src_ip": "ssh", "src_port": 22, "dst_port": 40001, "seconds": 9000},
        {"dst_ip": "ssh", "dst_port": 80, "seconds": 9000},
        {"dst_ip": "evil", "dst_port": 1000, "seconds": 9000},
        {"dst_ip": "ssh", "dst_port": 22, "seconds": 9000, "recording": "b"},
    ]
    assert places(flows(attacks + benign)).tolist()[3:] == ["victim", "victim"] + 3 * ["elsewhere"]


def test_replies_of_an_attack_make_the_service_and_not_the_attacker_the_victim() -> None:
    reply = {**ATTACK, "src_ip": "ssh", "src_port": 22, "dst_ip": "evil", "dst_port": 1001}
    found = places(flows([ATTACK, reply, {"dst_ip": "evil", "dst_port": 1001, "seconds": 9000}]))
    assert found.tolist()[2] == "elsewhere"


def test_windows_of_episodes_have_no_margin_and_are_of_their_recording() -> None:
    attacks = [{**ATTACK, "episode": "e1", "seconds": s} for s in (100, 200)] + [
        {**ATTACK, "episode": "e2", "seconds": 900}
    ]
    benign = [{"seconds": s} for s in (99, 150, 500, 900)] + [{"seconds": 150, "recording": "b"}]
    expected = ["elsewhere", "attack window", "elsewhere", "attack window", "elsewhere"]
    assert places(flows(attacks + benign)).tolist()[3:] == expected


def test_without_episodes_a_window_is_a_familys_flows_and_a_minute_around_them() -> None:
    attacks = [{**ATTACK, "seconds": s} for s in (100, 500, 2000)]
    benign = [{"seconds": s} for s in (39, 40, 300, 560, 561, 1500, 1940, 2061)]
    outside, inside = "elsewhere", "attack window"
    expected = [outside, inside, inside, inside, outside, outside, inside, outside]
    assert places(flows(attacks + benign)).tolist()[3:] == expected


def test_a_flow_that_was_open_during_the_attack_is_in_its_window() -> None:
    table = flows([{**ATTACK, "seconds": 100}, {"seconds": 5000}, {"seconds": 5000}])
    table["first_time"] = table["time"] - pd.to_timedelta([0, 4950, 1000], unit="s")
    assert places(table).tolist()[1:] == ["attack window", "elsewhere"]


def test_hard_negatives_come_before_victims_and_victims_before_windows() -> None:
    trouble = {"dst_ip": "ssh", "dst_port": 22, "hard_negative": "restart"}
    found = places(flows([ATTACK, trouble, {"dst_ip": "ssh", "dst_port": 22}, {}]))
    assert found.tolist()[1:] == ["hard negative", "victim", "attack window"]


def test_without_attacks_everything_is_elsewhere() -> None:
    assert places(flows([{}, {"seconds": 3}])).tolist() == ["elsewhere", "elsewhere"]


@pytest.mark.real_data
def test_february_2022(real_flows: Path) -> None:
    reports = read([real_flows]).reports
    table = collapse(derive(reports.assign(flow=identify(reports)))[0])
    found = places(table)
    assert found.isna().sum() == 28982
    assert found.value_counts().to_dict() == {
        "elsewhere": 11171, "attack window": 7133, "victim": 81, "hard negative": 0,
    }  # fmt: skip
    victims = table[found.eq("victim").to_numpy(bool)]
    assert np.isin(22, victims[["src_port", "dst_port"]].to_numpy(np.int64)).all()
