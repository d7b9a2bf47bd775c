from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.metrics import balanced_accuracy_score
from sklearn.tree import DecisionTreeClassifier

from flowsentry.flows.schema import BY_NAME, SCHEMA, conform
from flowsentry.simulation import WARM_UP_MINUTES, SimulationSettings, simulate
from flowsentry.simulation.settings import GROUPS, HARD_NEGATIVES

SMALL = SimulationSettings(seed=7, minutes=40, scale=0.05)

DIGEST = """
import hashlib, pandas as pd
from flowsentry.simulation import SimulationSettings, simulate
reports = simulate(SimulationSettings(seed=7, minutes=40, scale=0.05))
print(hashlib.sha256(reports.to_csv(index=False).encode()).hexdigest())
"""


def minutes_since(reports: pd.DataFrame, column: str = "start") -> pd.Series:
    return (reports[column] - reports["start"].min()).dt.total_seconds() / 60


def test_equal_settings_give_equal_recordings() -> None:
    pd.testing.assert_frame_equal(simulate(SMALL), simulate(SMALL))


def test_a_fresh_process_with_another_hash_seed_gives_the_same_recording() -> None:
    digest = hashlib.sha256(simulate(SMALL).to_csv(index=False).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        fresh = subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[3],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        )
        assert fresh.stdout.strip() == digest


def test_another_seed_gives_another_recording() -> None:
    other = simulate(SMALL.model_copy(update={"seed": 8}))
    ours = simulate(SMALL)
    assert set(ours["exchange"]).isdisjoint(other["exchange"])
    assert len(set(ours["flow_id"]) & set(other["flow_id"])) < len(ours) / 10


def test_leaving_an_attack_out_leaves_the_rest_as_it_is() -> None:
    happened = ["start", "src_ip", "dst_ip", "src_bytes", "dst_bytes", "family", "hard_negative", "role"]

    def exchanges(*attacks: str) -> pd.DataFrame:
        reports = simulate(SMALL.model_copy(update={"attacks": attacks}))
        forward = reports[reports["role"].eq("forward") & reports["final"]]
        return forward[happened].astype(str).drop_duplicates()

    both = exchanges("port-scan", "dns-tunnel")
    alone = exchanges("dns-tunnel")
    kept = both[both["family"].ne("port-scan")]
    assert kept["family"].eq("dns-tunnel").any()
    # the meter splits and turns round other flows than before
    assert len(kept.merge(alone)) > 0.9 * len(alone)


def test_the_table_is_canonical_and_keeps_to_what_a_source_may_know(default_reports: pd.DataFrame) -> None:
    reports = default_reports.drop(columns="number")
    pd.testing.assert_frame_equal(reports, conform(reports))
    derived = {column.name for column in SCHEMA if column.presence == "derived"}
    assert set(reports) == set(BY_NAME) - derived
    assert reports["row"].tolist() == list(range(1, len(reports) + 1))
    assert set(reports["recording"]) == set(reports["file"]) == {"simulate"}
    assert reports["time"].is_monotonic_increasing


def test_the_default_recording_has_the_size_that_training_is_made_for(
    default_reports: pd.DataFrame, default_flows: pd.DataFrame
) -> None:
    assert 8_000 <= len(default_flows) <= 14_000
    assert len(default_reports) <= 45_000
    assert 0.6 <= default_flows["label"].eq("benign").mean() <= 0.75


def test_bytes_packets_and_directions_agree(default_reports: pd.DataFrame) -> None:
    r = default_reports
    assert (r["bytes"] == r["src_bytes"] + r["dst_bytes"]).all()
    assert (r["packets"] == r["src_packets"] + r["dst_packets"]).all()
    assert (r["packets"] >= 1).all()
    for side in ("src", "dst"):
        assert (r[f"{side}_bytes"].eq(0) == r[f"{side}_packets"].eq(0)).all()
        sent = r[r[f"{side}_packets"] > 0]
        assert (sent[f"{side}_bytes"] >= 42 * sent[f"{side}_packets"]).all()
        assert (sent[f"{side}_bytes"] <= 1_514 * sent[f"{side}_packets"]).all()


def test_tcp_without_payload_is_told_by_its_bytes_per_packet(default_flows: pd.DataFrame) -> None:
    tcp = default_flows[default_flows["transport"].eq("tcp")]
    per_packet = tcp["bytes"] / tcp["packets"]
    halves = tcp["role"].eq("reply") | tcp["dst_packets"].eq(0)
    silent = tcp["family"].isin(["syn-flood", "refused-beacon", "port-scan"]) | tcp["hard_negative"].notna()
    assert (per_packet[silent] <= 80).all()
    ipv6 = tcp["src_ip"].eq("::")
    assert (per_packet[ipv6] <= 94).all()
    whole = tcp[~silent & ~ipv6 & ~halves & (tcp["bytes"] > 400)]
    assert (whole["bytes"] / whole["packets"] >= 95).mean() > 0.999


def test_every_flow_is_told_apart_from_its_reports(default_reports: pd.DataFrame) -> None:
    r = default_reports
    truth = r["exchange"].astype(str) + r["src_ip"].astype(str) + r["dst_ip"].astype(str)
    truth += r["src_port"].astype(str) + r["role"].astype(str)
    assert truth.groupby(r["number"]).nunique().eq(1).all()
    assert r["number"].groupby(truth).nunique().eq(1).all()


def test_reports_of_a_flow_grow_and_end_final(default_reports: pd.DataFrame) -> None:
    r = default_reports
    by_flow = r.groupby("number")
    for column in ("bytes", "duration", "packets", "src_bytes", "dst_bytes"):
        assert (by_flow[column].diff().fillna(0) >= 0).all(), column
    assert not r["final"][r["number"].eq(r["number"].shift(-1))].any()
    last = by_flow.tail(1)
    closed = last["end"] < last["time"].max() - pd.Timedelta(seconds=60)
    assert last["final"][closed].all()
    waited = (last["time"] - last["end"]).dt.total_seconds()[last["final"]]
    assert waited.min() >= 30
    assert waited.max() <= 51
    assert by_flow["final"].sum().max() == 1


def test_active_flows_are_reported_again_and_some_ticks_are_missing(default_reports: pd.DataFrame) -> None:
    long = default_reports[default_reports["duration"] > 120e9]
    gaps = default_reports[default_reports["number"].isin(long["number"])].groupby("number")["time"].diff()
    seconds = gaps.dropna().dt.total_seconds().round(-1)
    assert {10.0, 20.0} <= set(seconds)
    assert 0.2 < (seconds == 20).mean() < 0.7


def test_flow_ids_come_again_when_ports_are_reused(default_reports: pd.DataFrame) -> None:
    flows_per_id = default_reports.groupby("flow_id", observed=True)["number"].nunique()
    assert flows_per_id.gt(1).any()
    endpoints = ["src_ip", "dst_ip", "src_port", "dst_port", "transport"]
    assert default_reports.drop_duplicates(["flow_id", *endpoints])["flow_id"].is_unique


def test_twins_and_replies_share_their_exchange_and_its_truth(default_flows: pd.DataFrame) -> None:
    assert set(default_flows["role"]) == {"forward", "twin", "reply"}
    exchanges = default_flows.groupby("exchange")
    for truth in ("label", "family", "episode", "hard_negative"):
        assert exchanges[truth].nunique(dropna=False).eq(1).all(), truth
    roles = default_flows["role"].astype(str)
    assert exchanges["role"].first().notna().all()
    assert roles.eq("forward").groupby(default_flows["exchange"]).sum().eq(1).all()
    assert roles.eq("twin").groupby(default_flows["exchange"]).sum().le(1).all()
    assert 0.1 < roles.eq("twin").mean() < 0.4
    attack = default_flows[default_flows["family"].eq("ssh-brute-force")]
    assert {"twin", "reply"} < set(attack["role"])


def test_every_attack_and_hard_negative_is_there_after_the_warm_up(default_flows: pd.DataFrame) -> None:
    assert set(default_flows["family"].dropna()) == set(GROUPS)
    assert set(default_flows["hard_negative"].dropna()) == set(HARD_NEGATIVES)
    episodes = default_flows.dropna(subset="episode").groupby("episode", observed=True)
    assert len(episodes) == 3 * (len(GROUPS) + len(HARD_NEGATIVES))
    assert (default_flows["family"].notna() == default_flows["label"].eq("malicious")).all()
    assert (default_flows["family"].astype(object).map(GROUPS).dropna() == default_flows["group"].dropna()).all()
    assert default_flows["label"][default_flows["hard_negative"].notna()].eq("benign").all()
    tagged = default_flows["episode"].notna()
    assert (tagged == (default_flows["family"].notna() | default_flows["hard_negative"].notna())).all()
    assert minutes_since(default_flows)[tagged].min() >= WARM_UP_MINUTES - 0.1


def test_only_what_is_asked_for_happens() -> None:
    settings = SMALL.model_copy(update={"attacks": ("dns-tunnel",), "hard_negatives": (), "episodes": 2})
    reports = simulate(settings)
    assert set(reports["episode"].dropna()) == {"dns-tunnel-1", "dns-tunnel-2"}
    assert reports["hard_negative"].isna().all()


def test_no_rule_of_ports_separates_the_attacks(default_flows: pd.DataFrame) -> None:
    service = default_flows[["src_port", "dst_port"]].min(axis=1)
    benign = set(service[default_flows["label"].eq("benign")])
    malicious = service[default_flows["label"].eq("malicious") & default_flows["family"].ne("port-scan")]
    assert malicious.isin(benign).mean() > 0.999


@pytest.mark.parametrize("column", ["dst_port", "time"])
def test_an_identity_learned_from_other_attacks_is_no_better_than_chance(
    default_flows: pd.DataFrame, column: str
) -> None:
    values = pd.DataFrame({"time": minutes_since(default_flows), "dst_port": default_flows["dst_port"].astype(float)})
    malicious = default_flows["label"].eq("malicious")
    held_back = ~malicious & (values["time"] // 5 % 3).eq(0)
    scores = []
    for group in sorted(set(GROUPS.values())):
        tested = default_flows["group"].eq(group) | held_back
        rule = DecisionTreeClassifier(max_depth=10, class_weight="balanced", random_state=0)
        rule.fit(values.loc[~tested, [column]], malicious[~tested])
        scores.append(balanced_accuracy_score(malicious[tested], rule.predict(values.loc[tested, [column]])))
    assert np.mean(scores) < 0.6


@pytest.mark.parametrize("family", list(GROUPS))
def test_no_rule_of_times_separates_an_attack(default_flows: pd.DataFrame, family: str) -> None:
    minutes = minutes_since(default_flows)
    attack = minutes[default_flows["family"].eq(family)]
    middle = (WARM_UP_MINUTES + minutes.max()) / 2
    assert attack.min() < middle < attack.max()
    quiet = minutes[default_flows["label"].eq("benign")]
    assert quiet.between(attack.min(), attack.max()).sum() > len(attack)


def test_attackers_also_behave(default_flows: pd.DataFrame) -> None:
    forward = default_flows[default_flows["role"].eq("forward")]
    malicious = forward["label"].eq("malicious")
    attackers = forward[malicious].groupby("episode", observed=True)["src_ip"].agg(lambda ips: ips.mode()[0])
    usual = forward[~malicious]["src_ip"].value_counts()
    assert (attackers.map(usual).fillna(0) > 0).all()


def test_hosts_and_clients_have_no_workload_and_pods_have_one(default_flows: pd.DataFrame) -> None:
    for side in ("src", "dst"):
        addresses, workloads = default_flows[f"{side}_ip"].astype(str), default_flows[f"{side}_workload"]
        inside = addresses.str.startswith("10.")
        assert workloads[inside].notna().all()
        assert workloads[~inside].isna().all()
    assert "shop/web" in set(default_flows["src_workload"])


@pytest.mark.parametrize("minutes, scale, episodes", [(40, 0.001, 1), (41, 0.02, 9), (45, 0.3, 1)])
def test_small_recordings_hold_every_attack_too(minutes: int, scale: float, episodes: int) -> None:
    settings = SimulationSettings(seed=3, minutes=minutes, scale=scale, episodes=episodes)
    reports = simulate(settings)
    assert set(reports["family"].dropna()) == set(GROUPS)
    assert minutes_since(reports, "time").max() <= minutes


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"minutes": 39},
        {"minutes": "60"},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"attacks": ("syn-flood", "syn-flood")},
        {"attacks": ("smurf",)},
        {"speed": 1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SimulationSettings(**wrong)  # type: ignore[arg-type]


def test_lists_of_a_yaml_file_are_taken_for_names() -> None:
    assert SimulationSettings(attacks=["port-scan"]).attacks == ("port-scan",)  # type: ignore[arg-type]


def test_floats_do_not_decide_what_is_reported(default_reports: pd.DataFrame) -> None:
    """Times of reports are whole milliseconds, as every layout can write them."""
    assert (default_reports["time"].astype(np.int64) % 1_000 == 0).all()
