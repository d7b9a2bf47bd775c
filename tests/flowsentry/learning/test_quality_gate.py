from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from flowsentry.config import QualityGateSettings
from flowsentry.errors import StoreError
from flowsentry.learning.baselines import FittedBaseline
from flowsentry.learning.candidates import Recipe, judge_baselines
from flowsentry.learning.quality_gate import (
    Exposure,
    QualityDecision,
    Rule,
    Scored,
    Unscored,
    by_flow,
    exposure,
    fingerprints,
    judge,
    seen,
)
from flowsentry.reporting.metrics import rates
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

BENIGN, FLOOD, SHELL = 400, 100, 40


@pytest.fixture
def flows() -> pd.DataFrame:
    """400 benign flows, 100 of a flood, 40 of a shell and 3 of a rare attack, two flows to an exchange."""
    family = [None] * BENIGN + ["flood"] * FLOOD + ["shell"] * SHELL + ["rare"] * 3
    label = ["malicious" if name else "benign" for name in family]
    table = pd.DataFrame({"label": label, "corrected": label, "family": family}, dtype="category")
    table["exchange"] = np.arange(len(table)) // 2
    return table.rename_axis("flow")


def flagging(flows: pd.DataFrame, *, missed: int = 0, alarms: int = 0, family: str = "flood") -> np.ndarray:
    """Flags all attacks but the first `missed` of a family, and the first `alarms` benign flows."""
    flagged = flows["label"].eq("malicious").to_numpy(bool)
    flagged[np.flatnonzero(flows["family"].eq(family).to_numpy(bool))[:missed]] = False
    flagged[:alarms] = True
    return flagged


def scored(flagged: np.ndarray, version: str) -> Scored:
    return Scored(version, flagged.astype(float), flagged)


def baseline(flows: pd.DataFrame, flagged: np.ndarray, *, identity: bool = False) -> Any:
    fitted = FittedBaseline("it", "It", identity, "", lambda flows, features: np.zeros(len(flows)))
    table = pd.DataFrame({"fold": "random", "flow": flows.index, "flagged": flagged})
    other = table.assign(fold="time", flagged=True)
    return fitted, pd.concat([table, other]).astype({"fold": "category"})


def decide(flows: pd.DataFrame, mine: np.ndarray, theirs: np.ndarray | None, **changed: Any) -> QualityDecision:
    given: dict[str, Any] = {
        "challenger": scored(mine, "2"),
        "champion": None if theirs is None else scored(theirs, "1"),
        "seen": np.zeros(len(flows), bool),
        "baselines": {},
        "labels": "corrected",
        "settings": QualityGateSettings(),
    } | changed
    validation = given.pop("validation", flows.index.to_numpy())
    return judge(flows, validation, **given)


def rule(decision: QualityDecision, name: str) -> Rule:
    (found,) = [one for one in decision.rules if one.name == name]
    return found


def test_an_equal_challenger_passes(flows: pd.DataFrame) -> None:
    decision = decide(flows, flagging(flows, missed=5), flagging(flows, missed=5))
    assert decision.passed
    assert decision.basis == "champion"
    assert decision.challenger.metric == decision.champion.metric
    assert decision.challenger.metric.value == pytest.approx(138 / 143)
    assert (decision.difference.metric.low, decision.difference.metric.high) == (0, 0)
    assert {one.outcome for one in decision.rules} == {"passed", "not decided"}


def test_a_challenger_that_finds_less_fails_by_the_metric(flows: pd.DataFrame) -> None:
    decision = decide(flows, flagging(flows, missed=10), flagging(flows))
    assert not decision.passed
    assert rule(decision, "recall not worse").outcome == "failed"
    assert rule(decision, "recall not worse").figures["difference"] == pytest.approx(-10 / 143)
    assert "recall not worse: recall 0.9301" in decision.reason


def test_a_small_loss_that_is_no_chance_fails_too(flows: pd.DataFrame) -> None:
    """One exchange of 70 is lost: within the tolerance as a number, but not as an interval."""
    lenient = QualityGateSettings(max_loss=0.5, max_family_loss=0.5)
    some = decide(flows, flagging(flows, missed=2), flagging(flows), settings=lenient)
    many = decide(flows, flagging(flows, missed=20), flagging(flows), settings=lenient)
    assert rule(some, "recall not worse").outcome == "passed"
    assert some.difference.metric.high == 0
    assert rule(many, "recall not worse").outcome == "failed"
    assert many.difference.metric.high < 0


def test_a_loss_that_may_be_chance_fails_and_the_words_say_that_there_were_too_few_flows(flows: pd.DataFrame) -> None:
    """Three of 25 exchanges: more than is tolerated, but a draw of as many flows may show none."""
    few = np.r_[:BENIGN, BENIGN : BENIGN + 50]
    challenger, champion = flagging(flows, missed=8), flagging(flows, missed=4)
    challenger[BENIGN + 40 : BENIGN + 42] = champion[BENIGN + 42 : BENIGN + 44] = False
    decision = decide(flows, challenger, champion, validation=few)
    loss = decision.difference.metric
    assert (loss.value, decision.difference.metric.high >= 0) == (pytest.approx(-0.08), True)
    for name, key in (("recall not worse", "max_loss"), ("family flood not worse", "max_family_loss")):
        assert rule(decision, name).outcome == "failed"
        assert "too few flows to tell a loss from chance" in rule(decision, name).words
        assert f"more data, or a wider quality_gate.{key}" in rule(decision, name).words
    clear = decide(flows, flagging(flows, missed=30), champion)
    assert rule(clear, "recall not worse").outcome == "failed"
    assert "too few" not in clear.reason


def test_one_lost_family_fails_although_the_whole_is_better(flows: pd.DataFrame) -> None:
    challenger = flagging(flows, missed=8, family="shell")
    champion = flagging(flows, missed=40)
    decision = decide(flows, challenger, champion)
    assert decision.challenger.metric.value > decision.champion.metric.value
    assert [one.name for one in decision.rules if one.outcome == "failed"] == ["family shell not worse"]
    assert rule(decision, "family flood not worse").outcome == "passed"


def test_a_loss_of_exactly_the_tolerance_passes(flows: pd.DataFrame) -> None:
    settings = QualityGateSettings(max_loss=0.5, max_family_loss=0.05)
    decision = decide(flows, flagging(flows, missed=2, family="shell"), flagging(flows), settings=settings)
    assert rule(decision, "family shell not worse").figures["difference"] == pytest.approx(-0.05)
    assert decision.passed


def test_a_family_of_few_flows_is_reported_and_not_decided(flows: pd.DataFrame) -> None:
    decision = decide(
        flows, flagging(flows, missed=3, family="rare"), flagging(flows), settings=QualityGateSettings(max_loss=0.5)
    )
    lost = rule(decision, "family rare not worse")
    assert lost.outcome == "not decided"
    assert lost.figures["difference"] == -1
    assert "3 flows are fewer than 20" in lost.words
    assert decision.passed


def test_more_false_alarms_than_the_champion_fail_only_beyond_chance(flows: pd.DataFrame) -> None:
    settings = QualityGateSettings(max_fpr=0.2)
    chance = decide(flows, flagging(flows, alarms=4), flagging(flows, alarms=2), settings=settings)
    many = decide(flows, flagging(flows, alarms=40), flagging(flows, alarms=2), settings=settings)
    assert rule(chance, "FPR not worse").outcome == "passed"
    assert rule(many, "FPR not worse").outcome == "failed"
    assert rule(many, "FPR bar").outcome == "passed"


def test_the_bar_of_false_alarms_holds_whatever_the_champion_does(flows: pd.DataFrame) -> None:
    decision = decide(flows, flagging(flows, alarms=8), flagging(flows, alarms=20))
    assert [one.name for one in decision.rules if one.outcome == "failed"] == ["FPR bar"]


def test_only_flows_that_the_champion_has_not_learned_from_count(flows: pd.DataFrame) -> None:
    """The champion knows the first half of the flood by heart and finds little else."""
    learned = np.zeros(len(flows), bool)
    learned[BENIGN : BENIGN + 50] = True
    champion = flagging(flows) & (learned | flows["family"].eq("shell").to_numpy(bool))
    challenger = flagging(flows, missed=50)
    decision = decide(flows, challenger, champion, seen=learned)
    assert decision.passed
    assert (decision.malicious, decision.seen_by_champion) == (93, 50)
    assert decision.challenger.families["flood"].recall.value == 1
    assert decision.champion.families["flood"].recall.value == 0


def test_too_few_new_flows_mean_the_absolute_bars_on_the_whole_validation_part(flows: pd.DataFrame) -> None:
    learned = flagging(flows, missed=40)
    passing = decide(flows, flagging(flows, missed=5), flagging(flows), seen=learned)
    failing = decide(flows, flagging(flows, missed=95), flagging(flows), seen=learned)
    assert passing.passed
    assert not failing.passed
    for decision in (passing, failing):
        assert decision.basis == "absolute bars"
        assert decision.champion is None
        assert "only 400 benign and 40 malicious validation flows are new to both" in decision.basis_reason
        assert decision.malicious == 143
    assert [one.name for one in failing.rules if one.outcome == "failed"] == ["recall bar"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"champion": Unscored("1", "its view is behaviour 1")}, "the champion 1 cannot be compared: its view is"),
        ({"seen": None}, "the champion 1 cannot be compared: what it has learned from is not recorded"),
    ],
)
def test_a_champion_that_cannot_be_compared_fails_the_gate_unless_the_settings_ask_for_the_absolute_bars(
    flows: pd.DataFrame, changed: dict[str, Any], said: str
) -> None:
    given = {"champion_digest": "c" * 64} | changed
    decision = decide(flows, flagging(flows), flagging(flows), **given)
    assert [one.name for one in decision.rules if one.outcome == "failed"] == ["champion"]
    assert not decision.passed
    for words in (said, "quality_gate.without_champion: true"):
        assert words in decision.reason
    without = QualityGateSettings(without_champion=True)
    asked = decide(flows, flagging(flows), flagging(flows), settings=without, **given)
    assert asked.passed
    assert rule(asked, "champion").outcome == "not decided"
    assert said in asked.reason
    assert "held to the absolute bars alone, as quality_gate.without_champion asks" in asked.reason
    assert asked.champion_digest == decision.champion_digest == "c" * 64
    assert not decide(flows, flagging(flows, missed=100), flagging(flows), settings=without, **given).passed


def test_without_any_champion_the_absolute_bars_decide_and_families_are_told(flows: pd.DataFrame) -> None:
    decision = decide(flows, flagging(flows, missed=25), None)
    assert decision.passed
    assert decision.champion_digest is None
    assert "there is no champion yet" in decision.basis_reason
    assert rule(decision, "champion").outcome == rule(decision, "family flood").outcome == "not decided"
    assert rule(decision, "family flood").words.startswith("recall 0.7500")
    assert rule(decision, "family flood").figures["flows"] == 100
    assert not decide(flows, flagging(flows, missed=100), None, settings=QualityGateSettings(min_metric=0.5)).passed


def test_a_stored_champion_that_nothing_serves_is_compared_with_and_it_is_said(flows: pd.DataFrame) -> None:
    deployed = decide(flows, flagging(flows), flagging(flows), champion_digest="c" * 64)
    stored = decide(flows, flagging(flows), flagging(flows))
    assert deployed.basis_reason.startswith("compared with the champion 1: ")
    assert stored.basis == deployed.basis == "champion"
    assert "version 1, at stage production in ZenML although nothing is deployed" in stored.basis_reason
    assert not decide(flows, flagging(flows, missed=10), flagging(flows)).passed


def test_a_baseline_without_identity_must_be_beaten_on_the_same_flows(flows: pd.DataFrame) -> None:
    same = flagging(flows, missed=5)
    for given, outcome in ((same, "failed"), (flagging(flows, missed=6), "passed")):
        decision = decide(flows, same, same, baselines={"it": baseline(flows, given)})
        assert rule(decision, "better than It").outcome == outcome
        assert decision.passed == (outcome == "passed")
    assert decide(flows, same, same, baselines={"it": baseline(flows, flagging(flows), identity=True)}).passed


def test_a_baseline_that_flags_everything_is_no_rival(flows: pd.DataFrame) -> None:
    everything = baseline(flows, np.ones(len(flows), bool))
    decision = decide(flows, flagging(flows, missed=5), None, baselines={"it": everything})
    assert decision.passed
    assert rule(decision, "better than It").outcome == "not decided"
    assert "takes no part: its FPR 1.0000" in rule(decision, "better than It").words
    accuracy = QualityGateSettings(metric="accuracy")
    assert (
        rule(
            decide(flows, flagging(flows), None, baselines={"it": everything}, settings=accuracy), "better than It"
        ).outcome
        == "passed"
    )


@pytest.mark.parametrize("kept", ["benign", "malicious", "none"])
def test_flows_of_one_class_or_none_decide_nothing_so_the_gate_fails(flows: pd.DataFrame, kept: str) -> None:
    rows = flows.index[flows["label"].eq(kept)].to_numpy()
    decision = decide(flows, flagging(flows), flagging(flows), validation=rows)
    assert not decision.passed
    assert rule(decision, "both classes").outcome == "failed"
    assert QualityDecision.model_validate_json(decision.model_dump_json()) == decision


@pytest.mark.parametrize("metric", ["recall", "accuracy", "balanced_accuracy", "f1"])
def test_figures_are_those_of_the_evaluation_and_lie_within_their_intervals(flows: pd.DataFrame, metric: Any) -> None:
    flagged = flagging(flows, missed=20, alarms=6)
    decision = decide(flows, flagged, None, settings=QualityGateSettings(metric=metric))
    truth = flows["label"].eq("malicious").to_numpy(bool)
    expected = rates(decision.challenger.counts, truth, flagged.astype(float))
    figure = decision.challenger.metric
    assert figure.value == pytest.approx(getattr(expected, metric))
    assert figure.low < figure.value < figure.high
    assert decision.challenger.fpr.value == expected.fpr


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Flows of an exchange are right or wrong together: an interval that takes them for independent is too narrow."""
    draw = np.random.default_rng(0)
    covered, rounds = 0, 200
    for _ in range(rounds):
        exchange = np.repeat(np.arange(120), 5)
        table = pd.DataFrame({"label": np.where(exchange < 60, "benign", "malicious"), "exchange": exchange})
        table = table.assign(corrected=table["label"], family=None)
        flagged = np.repeat(draw.random(120) < 0.7, 5) & (exchange >= 60)
        figure = decide(table, flagged, None).challenger.metric
        covered += figure.low <= 0.7 <= figure.high
    assert 0.89 <= covered / rounds <= 0.99


def test_the_decision_is_the_same_every_time_and_survives_as_json(flows: pd.DataFrame) -> None:
    one, other = (decide(flows, flagging(flows, missed=9), flagging(flows, missed=4, alarms=3)) for _ in range(2))
    assert one == other
    assert QualityDecision.model_validate_json(one.model_dump_json()) == one


def test_scores_of_other_flows_are_refused(flows: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="does not have"):
        decide(flows, flagging(flows), None, validation=np.array([0, 10_000]))
    with pytest.raises(ValueError, match="no scores for some validation flows"):
        decide(flows, flagging(flows), None, baselines={"it": baseline(flows.head(10), np.ones(10, bool))})
    verdicts = pd.DataFrame({"flow": [0], "anomaly_score": [1.0], "label": ["benign"]})
    with pytest.raises(ValueError, match="542 flows have no verdict"):
        by_flow(verdicts, flows, "1")


def test_a_flow_has_the_verdict_of_its_last_report(small: Small) -> None:
    verdicts = trained(small, family="tails").verdicts(small.raw)
    mine = by_flow(verdicts, small.flows, "7")
    assert len(mine.score) == len(small.flows) < len(verdicts)
    assert mine.score.tolist() == verdicts.groupby("flow")["anomaly_score"].max().tolist()
    assert mine.flagged.tolist() == (mine.score >= 3).tolist()


def test_what_was_learned_from_is_known_again_under_another_file_name_and_order(small: Small, tmp_path: Path) -> None:
    learned = exposure(small.flows, small.splits)
    learned.save(tmp_path)
    renamed = small.flows.assign(file="other.csv", recording="other", row=1).sample(frac=1, random_state=0)
    again = seen(renamed, Exposure.load(tmp_path))
    part = small.splits.parts["random"].loc[renamed.index]
    assert again[part.isin(["fit", "calibration"]).to_numpy()].all()
    assert not again[part.isin(["test", "validation"]).to_numpy()].any()


def test_one_known_flow_makes_its_whole_exchange_known(small: Small) -> None:
    exchange = small.flows["exchange"].value_counts()
    twins = small.flows[small.flows["exchange"] == exchange.index[exchange > 1][0]]
    known = seen(small.flows, Exposure(np.unique(fingerprints(twins.head(1)))))
    assert small.flows.index[known].tolist() == twins.index.tolist()
    assert not seen(small.flows, Exposure(np.empty(0, np.uint64))).any()


@pytest.mark.parametrize(
    "column", ["flow_id", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "time"]
)
def test_a_flow_that_differs_in_anything_is_another(small: Small, column: str) -> None:
    one = small.flows.dropna(subset=["src_port", "dst_port", "transport"]).head(50)
    value = one[column]
    match column:
        case "time":
            other = value + pd.Timedelta(microseconds=1)
        case "src_port" | "dst_port" | "bytes":
            other = value + 1
        case _:
            other = value.astype(str) + "0"
    assert not np.isin(fingerprints(one.assign(**{column: other})), fingerprints(one)).any()
    assert fingerprints(one).tolist() == fingerprints(one.copy()).tolist()


@pytest.mark.parametrize(
    "content", [None, b"", b"nonsense", np.array([2, 1], np.uint64), np.array([1.0]), np.array([{}], object)]
)
def test_a_damaged_exposure_is_refused(tmp_path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / "exposure.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "exposure.npy", content)
    with pytest.raises(StoreError, match=r"exposure\.npy.*train again"):
        Exposure.load(tmp_path)


def test_splits_of_other_flows_are_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="other flows"):
        exposure(small.flows.head(10), small.splits)


def test_a_trained_detector_passes_its_own_gate_on_simulated_flows(small: Small, recipe: Recipe) -> None:
    """As the pipeline does it; the champion was trained on the same flows."""
    scores = by_flow(trained(small, family="tails").verdicts(small.raw), small.flows, "1")
    only = replace(small.splits, folds=tuple(small.splits.of("random")), parts=small.splits.parts[["random"]])
    decision = judge(
        small.flows,
        small.splits.rows("random", "validation"),
        challenger=replace(scores, version="2"),
        champion=scores,
        seen=seen(small.flows, exposure(small.flows, small.splits)),
        baselines=judge_baselines(small.views["behaviour"], small.flows, only, recipe),
        labels="corrected",
        settings=QualityGateSettings(min_flows=1, max_fpr=0.05),
    )
    assert decision.seen_by_champion == 0
    assert decision.difference.metric.value == 0
    assert decision.passed, decision.reason
    assert {one.name for one in decision.baselines} >= {"constant", "best_column", "port_rule"}
