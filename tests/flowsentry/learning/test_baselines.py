from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flowsentry.errors import ProtocolError
from flowsentry.flows import sources
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.baselines import FittedBaseline, fit_baselines


def flows(n: int = 1000, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Malicious flows go to port 4444, are small, come last and have the last ids."""
    random = np.random.default_rng(seed)
    y = np.arange(n) >= 0.7 * n
    table = pd.DataFrame(
        {
            "flow_id": pd.Series([f"flow-{i:06d}" for i in range(n)], dtype="string[pyarrow]"),
            "final": random.random(n) < 0.5,
            "bytes": np.where(y, 132, random.integers(200, 10_000, n)),
            "duration": random.integers(0, 10**9, n),
            "transport": pd.Categorical(random.choice(["tcp", "udp"], n)),
            "time": pd.Timestamp("2022-02-25", tz="UTC") + pd.to_timedelta(np.arange(n), unit="s"),
            "src_port": pd.array(random.integers(30_000, 60_000, n), dtype="Int32"),
            "dst_port": pd.array(np.where(y, 4444, random.choice([53, 80], n)), dtype="Int32"),
        }
    )
    table.loc[::50, ["src_port", "dst_port", "transport"]] = None
    return table, y


def by_name(fitted: list[FittedBaseline]) -> dict[str, FittedBaseline]:
    return {baseline.name: baseline for baseline in fitted}


def accuracy(baseline: FittedBaseline, table: pd.DataFrame, y: np.ndarray) -> float:
    return float(((baseline.score(table, None) > 0) == y).mean())


def test_every_baseline_finds_what_it_can() -> None:
    table, y = flows()
    fitted = by_name(fit_baselines(table, None, y, 0))
    assert list(fitted) == ["constant", "best_column", "port_rule", "flow_id", "timestamp"]
    found = {name: accuracy(baseline, table, y) for name, baseline in fitted.items()}
    assert found["constant"] == pytest.approx(0.7)
    assert found["port_rule"] == pytest.approx(1 - 6 / 1000)  # six malicious flows have no port
    assert found["best_column"] == found["flow_id"] == found["timestamp"] == 1.0
    assert {name for name, baseline in fitted.items() if baseline.uses_identity} == {
        "port_rule",
        "flow_id",
        "timestamp",
    }
    assert fitted["port_rule"].learned == "to port 4444"
    assert fitted["best_column"].learned.startswith("bytes")


def test_a_port_without_support_is_no_rule() -> None:
    table, y = flows()
    table["dst_port"] = pd.array(np.where(y, 10_000 + np.arange(1000) // 8, 80), dtype="Int32")
    rule = by_name(fit_baselines(table, None, y, 0))["port_rule"]
    assert rule.learned == "no port stands out"
    assert len(set(rule.score(table, None))) == 1


def test_the_best_column_may_be_a_feature_and_is_then_needed() -> None:
    table, y = flows()
    table["bytes"] = 1
    features = pd.DataFrame({"burst": np.where(y, 40.0, 1.0), "noise": np.arange(1000) % 7})
    best = by_name(fit_baselines(table, features, y, 0))["best_column"]
    assert best.learned.startswith("burst")
    assert ((best.score(table, features) > 0) == y).all()
    with pytest.raises(ValueError, match="burst"):
        best.score(table, None)


def test_scores_do_not_depend_on_the_other_rows_and_know_unseen_values() -> None:
    table, y = flows()
    later, _ = flows(1200, seed=1)
    later["transport"] = pd.Categorical(["sctp"] * 1200)
    for baseline in fit_baselines(table, None, y, 0):
        whole = baseline.score(later, None)
        assert np.isfinite(whole).all()
        assert (baseline.score(later.iloc[100:130], None) == whole[100:130]).all()


def test_the_choice_of_the_column_is_reproducible() -> None:
    random = np.random.default_rng(0)
    table, y = flows(600)
    table["bytes"] = random.permutation(600)
    table["exchange"] = np.arange(600) // 2
    one, two = (by_name(fit_baselines(table, None, y, 3))["best_column"] for _ in range(2))
    assert one.learned == two.learned


def test_both_classes_are_needed() -> None:
    table, _ = flows(50)
    with pytest.raises(ProtocolError, match="benign and malicious"):
        fit_baselines(table, None, np.zeros(50, bool), 0)


@pytest.mark.real_data
def test_three_ports_almost_solve_the_real_recording(real_flows: Path) -> None:
    reports = sources.read([real_flows]).reports
    reports["flow"] = identify(reports)
    table = collapse(reports)
    y = is_malicious(table["label"])
    train = np.random.default_rng(0).random(len(y)) < 0.7
    found = by_name(fit_baselines(table[train], None, y[train], 0))
    scores = {name: accuracy(baseline, table[~train], y[~train]) for name, baseline in found.items()}
    assert sorted(found["port_rule"].learned.removeprefix("to port ").split(", ")) == ["22", "31301", "4444"]
    assert scores["port_rule"] > 0.997
    assert scores["flow_id"] > 0.95
    assert scores["timestamp"] > 0.94
    assert scores["constant"] == pytest.approx(0.595, abs=0.01)
