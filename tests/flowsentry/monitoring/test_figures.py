from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsentry.monitoring import figures
from flowsentry.monitoring.figures import Card, Finding, Progress, Share, Standing, Tally, card_of, findings

CARD = Card({"flood": Share(400, 398), "scan": Share(60, 57)}, Share(3000, 6))
AT_WORK = Progress(total=10_000, finished=False, silent_seconds=0.5)


def rows(
    expected: Sequence[str | None],
    flagged: Sequence[bool | None],
    *,
    flow: Sequence[int] | None = None,
    family: Sequence[str | None] | None = None,
    latency: float = 3.0,
    warm: bool = True,
) -> pd.DataFrame:
    """Journal rows: e.g. `benign`, or the name of a family, and what was called malicious; None: rejected."""
    count = len(expected)
    return pd.DataFrame(
        {
            "position": np.arange(count),
            "flow": np.arange(count) if flow is None else list(flow),
            "expected": [e if e in (None, "benign") else "malicious" for e in expected],
            "family": [None if e in (None, "benign") else e for e in expected] if family is None else list(family),
            "verdict": [None if f is None else "malicious" if f else "benign" for f in flagged],
            "warm": pd.array([warm] * count, dtype="boolean"),
            "request": np.arange(count),
            "latency_ms": np.full(count, latency),
            "sent": pd.Timestamp("2026-01-01T00:00:00Z") + pd.to_timedelta(np.arange(count), unit="s"),
        }
    )


def tally_of(table: pd.DataFrame) -> Tally:
    tally = Tally()
    tally.take(table)
    return tally


def replayed(benign: int, false_alarms: int, **families: tuple[int, int]) -> Tally:
    """A replay with so many flows, and of every family so many flows and how many of them were found."""
    expected = ["benign"] * benign + [name for name, (flows, _) in families.items() for _ in range(flows)]
    flagged = [i < false_alarms for i in range(benign)]
    for flows, found in families.values():
        flagged += [i < found for i in range(flows)]
    order = np.random.default_rng(1).permutation(len(expected))
    return tally_of(rows([expected[i] for i in order], [flagged[i] for i in order]))


def codes(found: Sequence[Finding]) -> list[str]:
    return [finding.code for finding in found]


def test_rates_are_those_of_the_confusion_matrix() -> None:
    standing = replayed(90, 9, flood=(10, 8)).standing
    assert standing == Standing(tp=8, fp=9, tn=81, fn=2)
    assert (standing.right, standing.wrong, standing.flows) == (89, 11, 100)
    assert standing.recall == pytest.approx(0.8)
    assert standing.fpr == pytest.approx(0.1)
    assert standing.precision == pytest.approx(8 / 17)
    assert standing.balanced_accuracy == pytest.approx(0.85)


def test_rates_without_flows_are_undefined_and_not_nought() -> None:
    benign = replayed(5, 0).standing
    assert (benign.recall, benign.precision, benign.balanced_accuracy, benign.fpr) == (None, None, None, 0.0)
    nothing = Tally()
    nothing.take(rows([], []))
    assert nothing.standing.accuracy is None
    assert nothing.history().empty
    assert nothing.latency(0.99) is None


def test_a_constant_model_is_half_right_in_balanced_accuracy_whatever_its_share_of_right_answers() -> None:
    standing = replayed(900, 0, flood=(100, 100)).standing
    benign, malicious = standing.always("benign"), standing.always("malicious")
    assert (benign.accuracy, malicious.accuracy) == (0.9, 0.1)
    assert benign.balanced_accuracy == malicious.balanced_accuracy == 0.5
    assert (benign.recall, malicious.recall) == (0, 1)


def test_a_flow_counts_once_by_its_latest_verdict() -> None:
    table = rows(["flood"] * 3 + ["benign"], [False, True, True, False], flow=[7, 7, 7, 8])
    tally = tally_of(table)
    assert tally.standing == Standing(tp=1, fp=0, tn=1, fn=0)
    assert tally.history()["missed"].tolist() == [1, 0, 0, 0]
    assert tally.history()["recent_recall"].tolist() == [0, 1, 1, 1]
    assert tally.rows == 4


def test_unlabelled_flows_are_neither_right_nor_wrong() -> None:
    tally = tally_of(rows([None, None, "benign"], [True, False, False]))
    assert tally.standing == Standing(tp=0, fp=0, tn=1, fn=0)
    assert tally.unlabelled == Share(2, 1)


def test_a_malicious_flow_without_family_is_of_the_generic_one() -> None:
    assert tally_of(rows(["flood"], [True], family=[None])).family("attack") == Share(1, 1)


def test_flows_judged_cold_are_left_out_of_comparisons_for_good() -> None:
    cold = rows(["flood", "flood"], [False, False], flow=[0, 1], warm=False)
    later = rows(["flood", "flood"], [True, True], flow=[0, 2]).assign(position=[2, 3])
    tally = Tally()
    tally.take(cold)
    tally.take(later)
    assert tally.family("flood") == Share(3, 2)
    assert tally.family("flood", warm=True) == Share(1, 1)
    assert tally.cold == 2


report = st.tuples(
    st.integers(0, 12), st.sampled_from([True, False, None]), st.booleans(), st.sampled_from([1.0, 5.0, 80.0])
)


@given(st.lists(report, min_size=1, max_size=120), st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_portions_of_any_size_give_the_same_figures(
    reports: list[tuple[int, bool | None, bool, float]], sizes: list[int]
) -> None:
    kind = ["benign", "benign", None, "flood", "scan"]
    table = rows([kind[flow % 5] for flow, *_ in reports], [f for _, f, *_ in reports], flow=[f for f, *_ in reports])
    table = table.assign(
        warm=pd.array([w for *_, w, _ in reports], dtype="boolean"),
        latency_ms=[ms for *_, ms in reports],
        request=np.arange(len(table)) // 3 * 3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "WINDOW", 10)
        patch.setattr(figures, "MOST_POINTS", 16)
        whole, portions = tally_of(table), Tally()
        begin = 0
        while begin < len(table):
            size = sizes[begin % len(sizes)]
            portions.take(table.iloc[begin : begin + size])
            begin += size
        for one, other in (
            (whole.history(), portions.history()),
            (whole.family_history(), portions.family_history()),
        ):
            order = [c for c in ("reports", "family") if c in one]
            pd.testing.assert_frame_equal(
                one.sort_values(order, ignore_index=True), other.sort_values(order, ignore_index=True)
            )
        assert len(whole.history()) <= 17
    judged = table[table["verdict"].notna()]
    latest = judged.groupby("flow").last()
    assert whole.standing == portions.standing
    assert whole.standing.tp == int((latest["expected"].eq("malicious") & latest["verdict"].eq("malicious")).sum())
    assert whole.standing.fp == int((latest["expected"].eq("benign") & latest["verdict"].eq("malicious")).sum())
    assert whole.flows == len(latest)
    assert whole.warm_standing == portions.warm_standing
    assert (whole.requests, whole.rejected, whole.cold) == (portions.requests, portions.rejected, portions.cold)


def test_the_past_stays_short_and_ends_now() -> None:
    tally = replayed(5001, 0, flood=(100, 100))
    past = tally.history()
    assert len(past) <= figures.MOST_POINTS + 1
    assert past["reports"].is_monotonic_increasing
    assert past["reports"].iloc[-1] == 5101
    assert past["right"].iloc[-1] == 5101


def test_many_families_share_a_place() -> None:
    names = [f"family {i}" for i in range(50)]
    tally = tally_of(rows(names, [True] * 50))
    assert len(tally.families) == figures.MOST_FAMILIES + 1
    assert tally.family(figures.OTHERS).flows == 30


def test_latency_is_of_requests_and_not_of_their_reports() -> None:
    table = rows(["benign"] * 1000, [False] * 1000).assign(
        request=[0] * 901 + list(range(901, 1000)), latency_ms=[500.0] * 901 + [2.0] * 99
    )
    tally = tally_of(table)
    assert tally.requests == 100
    assert tally.latency(0.5) == pytest.approx(2.0, rel=0.06)
    assert tally.latency(1.0) == pytest.approx(500.0, rel=0.06)


def test_a_healthy_replay_raises_nothing() -> None:
    tally = replayed(4000, 9, flood=(300, 299), scan=(40, 37), refused=(12, 11))
    assert findings(tally, CARD, AT_WORK) == []
    assert findings(tally, None, Progress(tally.rows, finished=True, silent_seconds=9e9)) == []


def test_a_model_that_calls_everything_benign_is_found_out_though_most_answers_are_right() -> None:
    found = findings(replayed(614, 0, flood=(71, 0)), CARD, AT_WORK)
    assert codes(found) == ["constant"]
    assert "finds nothing" in found[0].text
    assert "all 71 malicious flows" in found[0].text
    assert found[0].severity == "bad"


def test_a_model_that_calls_everything_malicious_is_found_out_without_any_attack() -> None:
    found = findings(replayed(30, 30), CARD, AT_WORK)
    assert codes(found)[0] == "constant"
    assert "called malicious" in found[0].text


def test_a_few_missed_flows_at_the_beginning_are_not_called_constant() -> None:
    assert codes(findings(replayed(100, 0, flood=(5, 0)), CARD, AT_WORK)) == ["untested"]


@pytest.mark.parametrize(
    ("tally", "words"),
    [
        (replayed(1000, 400, flood=(50, 50)), "too many alarms"),
        (replayed(1000, 0, flood=(500, 60)), "too few alarms"),
        (replayed(1000, 2, flood=(400, 398), tunnel=(12, 0)), "Blind to tunnel: none of its 12"),
        (replayed(2000, 30, flood=(400, 398)), "More false alarms than its card"),
    ],
)
def test_a_skewed_model_is_found_out(tally: Tally, words: str) -> None:
    found = [finding for finding in findings(tally, CARD, AT_WORK) if finding.code == "skewed"]
    assert any(words in finding.text for finding in found), found


def test_what_is_worse_than_the_card_is_named_and_weighed() -> None:
    found = findings(replayed(1000, 1, flood=(300, 220), scan=(40, 37)), CARD, AT_WORK)
    assert codes(found) == ["worse"]
    assert "flood" in found[0].text
    assert "73% of 300" in found[0].text
    assert found[0].severity == "note"
    half = findings(replayed(1000, 1, flood=(300, 140), scan=(40, 37)), CARD, AT_WORK)
    assert [(finding.code, finding.severity) for finding in half] == [("worse", "bad")]
    few_false_alarms = findings(replayed(9000, 80, flood=(400, 398)), CARD, AT_WORK)
    assert [(finding.code, finding.severity) for finding in few_false_alarms] == [("skewed", "note")]


def test_small_numbers_do_not_alarm() -> None:
    assert findings(replayed(200, 3, flood=(8, 7), scan=(6, 4)), CARD, AT_WORK) == []
    unsure = Card({"flood": Share(4, 4)}, Share(40, 0))
    assert findings(replayed(200, 3, flood=(30, 24)), unsure, AT_WORK) == []


def test_slow_requests_are_told_and_one_slow_restart_is_not() -> None:
    table = rows(["benign"] * 190 + ["flood"] * 10, [False] * 190 + [True] * 10)
    assert findings(tally_of(table.assign(latency_ms=[4000.0] + [3.0] * 199)), None, AT_WORK) == []
    assert codes(findings(tally_of(table.assign(latency_ms=[900.0] * 9 + [3.0] * 191)), None, AT_WORK)) == ["slow"]


def test_lost_verdicts_are_counted() -> None:
    tally = tally_of(rows(["benign"] * 20 + ["flood"] * 10, [None] + [False] * 19 + [True] * 10))
    found = findings(tally, None, Progress(total=33, finished=True, silent_seconds=0))
    assert codes(found) == ["lost", "lost"]
    assert "1 of 30 reports have no verdict" in found[0].text
    assert "3 reports were never answered" in found[1].text


def test_a_replay_that_stands_still_says_how_to_go_on() -> None:
    found = findings(replayed(50, 0, flood=(10, 10)), None, Progress(100, finished=False, silent_seconds=60))
    assert codes(found) == ["stopped"]
    assert "--resume" in found[0].text


def test_right_answers_on_benign_flows_alone_prove_nothing() -> None:
    found = findings(replayed(500, 0), CARD, AT_WORK)
    assert codes(found) == ["untested"]
    assert found[0].severity == "note"


def test_the_card_is_read_from_what_the_service_says_and_a_strange_one_is_none() -> None:
    scores = {
        "counts": {"tp": 9, "fp": 1, "tn": 99, "fn": 1},
        "families": {"flood": {"flows": 10, "flagged": 9, "rate": 0.9}},
    }
    assert card_of({"card": {"validation": {"corrected": scores}}}) == Card({"flood": Share(10, 9)}, Share(100, 1))
    strange: list[dict[str, object]] = [{}, {"card": None}, {"card": {"validation": {"corrected": {"counts": 3}}}}]
    assert [card_of(description) for description in strange] == [None, None, None]
