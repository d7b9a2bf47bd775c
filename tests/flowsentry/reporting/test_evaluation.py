from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import pytest

from flowsentry.features.splits import Fold, Splits
from flowsentry.reporting.evaluation import Evaluation, evaluate, validation_scores


def _again(flows, splits, scores):
    return evaluate(
        flows, splits, {"m": scores}, {}, titles={}, uses_identity={}, limit=2.0, data={"view": "behaviour"}
    )


def test_random_protocol_on_corrected_labels_by_hand(evaluation):
    scores = evaluation.entry("decision_tree").scores["random"]["corrected"]
    assert scores.counts.model_dump() == {"tp": 2, "fp": 1, "tn": 2, "fn": 1}
    assert scores.mean.accuracy == pytest.approx(4 / 6)
    assert scores.mean.balanced_accuracy == pytest.approx(2 / 3)
    assert scores.mean.precision == pytest.approx(2 / 3)
    assert scores.mean.f1 == pytest.approx(2 / 3)
    assert scores.mean.fpr == pytest.approx(1 / 3)
    assert scores.mean.roc_auc == pytest.approx(7 / 9)
    assert scores.mean.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert scores.own_mean.model_dump() == pytest.approx({"accuracy": 5 / 6, "recall": 2 / 3, "fpr": 0.0})
    assert scores.worst == scores.mean


def test_published_labels_call_the_reply_a_false_alarm(evaluation):
    scores = evaluation.entry("decision_tree").scores["random"]["published"]
    assert scores.counts.model_dump() == {"tp": 1, "fp": 2, "tn": 2, "fn": 1}
    assert scores.mean.fpr == 0.5
    assert scores.families["shell"].flows == 1
    assert scores.places["malicious when corrected"].model_dump() == {
        "flows": 1,
        "mean": 1.0,
        "worst": 1.0,
        "worst_fold": "random",
    }
    assert evaluation.corrections == 1
    assert evaluation.label_sets == ("published", "corrected")


def test_family_recall_comes_from_the_folds_that_held_the_family_out(evaluation):
    scores = evaluation.entry("decision_tree").scores["family"]["corrected"]
    assert [fold.at_limit.recall for fold in scores.folds] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3])
    assert scores.folds[1].families.keys() == {"flood"}
    assert scores.families["flood"].model_dump() == {
        "flows": 2,
        "mean": 1.0,
        "worst": 1.0,
        "worst_fold": "family/flood/0",
    }
    shell = scores.families["shell"]
    assert (shell.flows, shell.worst, shell.worst_fold) == (3, pytest.approx(1 / 3), "family/shell/1")
    assert shell.mean == pytest.approx(0.5)
    assert scores.family_recall.mean == pytest.approx(0.75)
    assert scores.family_recall.worst == pytest.approx(1 / 3)


def test_aggregates_over_folds_are_mean_and_worst(evaluation):
    scores = evaluation.entry("decision_tree").scores["family"]["corrected"]
    assert scores.mean.recall == pytest.approx((1 + 2 / 3 + 2 / 3 + 1 / 3) / 4)
    assert scores.worst.recall == pytest.approx(1 / 3)
    assert (scores.mean.fpr, scores.worst.fpr) == (0.25, 0.5)
    assert scores.counts.model_dump() == {"tp": 7, "fp": 2, "tn": 6, "fn": 4}


def test_fpr_by_place_counts_benign_flows_only(evaluation):
    places = evaluation.entry("decision_tree").scores["family"]["corrected"].places
    assert {name: (s.flows, s.mean, s.worst) for name, s in places.items()} == {
        "attack window": (1, 0.0, 0.0),
        "elsewhere": (2, 0.0, 0.0),
        "victim": (1, 1.0, 1.0),
    }


def test_warm_up_and_last_tick_are_reported_apart_and_not_scored(evaluation):
    scores = evaluation.entry("decision_tree").scores["random"]["corrected"]
    assert {name: (s.flows, s.mean) for name, s in scores.apart.items()} == {
        "warm-up": (1, 1.0),
        "last-tick": (1, 0.0),
    }
    assert sum(scores.counts.model_dump().values()) == 6


def test_validation_rows_never_enter_the_evaluation(flows, splits, model_scores):
    before = _again(flows, splits, model_scores)
    changed = model_scores.copy()
    rows = (changed["fold"] == "random") & changed["flow"].isin([3, 7])
    assert rows.sum() == 2
    changed.loc[rows, "score"] = -7.0
    changed.loc[rows, ["flagged", "predicted"]] = ~changed.loc[rows, ["flagged", "predicted"]]
    assert _again(flows, splits, changed) == before
    assert _again(flows, splits, model_scores[~rows]) == before


def test_training_rows_never_enter_the_evaluation(flows, splits, model_scores):
    before = _again(flows, splits, model_scores)
    extra = pd.DataFrame({"fold": ["random"], "flow": [9], "score": [9.0], "flagged": [True], "predicted": [True]})
    assert _again(flows, splits, pd.concat([model_scores.astype({"fold": object}), extra])) == before


def test_validation_scores_are_those_of_the_validation_part_alone(flows, splits, model_scores):
    found = validation_scores(flows, splits, {"m": model_scores})["m"]["corrected"]
    assert found.counts.model_dump() == {"tp": 1, "fp": 0, "tn": 1, "fn": 0}
    assert found.families["flood"].flows == 1
    assert found.at_limit.recall == 1.0


def test_validation_scores_need_a_random_fold(flows, splits, model_scores):
    without = Splits(splits.parts, tuple(f for f in splits.folds if f.protocol != "random"), {})
    with pytest.raises(ValueError, match="no fold of the protocol random"):
        validation_scores(flows, without, {"m": model_scores})


def test_undefined_figures_are_null_in_json_and_it_reads_back(flows, splits, constant_scores):
    only_benign = flows.assign(label="benign", corrected="benign", family=None, group=None)
    evaluation = _again(only_benign, splits, constant_scores)
    scores = json.loads(evaluation.to_json())["entries"][0]["scores"]["random"]["corrected"]
    assert scores["mean"]["recall"] is scores["mean"]["roc_auc"] is scores["worst"]["f1"] is None
    assert scores["mean"]["fpr"] == 0.0
    assert "NaN" not in evaluation.to_json()
    assert Evaluation.model_validate_json(evaluation.to_json()) == evaluation


def test_malicious_flows_without_a_family_are_unnamed(flows, splits, model_scores):
    evaluation = _again(flows.drop(columns=["family", "group", "place"]), splits, model_scores)
    scores = evaluation.entry("m").scores["random"]["corrected"]
    assert scores.families["unnamed"].flows == 3
    assert scores.places == {}
    assert evaluation.entry("m").scores["family"]["corrected"].families == {}


def test_a_fold_without_scores_is_named_and_left_out_of_the_mean(flows, splits, model_scores):
    scores = _again(flows, splits, model_scores[model_scores["fold"] != "family/shell/1"])
    family = scores.entry("m").scores["family"]["corrected"]
    assert family.missing == ("family/shell/1",)
    assert family.families["shell"].mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.drop(columns="predicted"), "lack the columns predicted"),
        (lambda t: t[~((t["fold"] == "time") & (t["flow"] == 6))], "lack 1 tested flows of the fold time"),
        (lambda t: pd.concat([t, t.tail(1)]), "twice in the fold family/shell/1"),
        (lambda t: t.assign(flow=t["flow"] + 1), "that the flow table does not have"),
        (lambda t: t.assign(score=np.nan), "are not numbers in the fold"),
    ],
)
def test_tables_of_scores_that_do_not_fit_are_refused(flows, splits, model_scores, damage, message):
    with pytest.raises(ValueError, match=message):
        _again(flows, splits, damage(model_scores))


def test_splits_of_other_flows_are_refused(flows, splits, model_scores):
    with pytest.raises(ValueError, match="splits are of other flows"):
        _again(flows.iloc[:-1], splits, model_scores)


def test_table_has_a_row_for_every_candidate_and_baseline(evaluation):
    table = evaluation.table("family", "corrected")
    assert table.index.tolist() == ["decision_tree", "constant", "flow_id"]
    assert table.loc["decision_tree", "recall"] == pytest.approx(2 / 3)
    assert table.loc["decision_tree", "fpr_worst"] == 0.5
    assert table.loc["decision_tree", "family_recall"] == pytest.approx(0.75)
    assert np.isnan(table.loc["constant", "precision"])
    assert table["baseline"].tolist() == [False, True, True]
    assert table["uses_identity"].tolist() == [False, False, True]


def test_flow_numbers_need_not_be_positions(flows, splits, model_scores):
    moved = pd.Index(np.arange(12)[::-1] * 10 + 5, name="flow")
    evaluation = _again(
        flows.set_axis(moved),
        Splits(splits.parts.set_axis(moved), splits.folds, {}),
        model_scores.assign(flow=moved.to_numpy()[model_scores["flow"]]),
    )
    assert evaluation.entries == _again(flows, splits, model_scores).entries


@pytest.mark.slow
def test_six_candidates_in_fourteen_folds_of_fifty_thousand_flows_take_less_than_ten_seconds():
    rng, size = np.random.default_rng(1), 50_000
    malicious = rng.random(size) < 0.5
    label = pd.Categorical(np.where(malicious, "malicious", "benign"))
    attack = pd.Categorical(np.where(malicious, rng.choice(["a", "b", "c"], size), None))
    place = pd.Categorical(rng.choice(["victim", "elsewhere"], size))
    flows = pd.DataFrame({"label": label, "corrected": label, "family": attack, "group": attack, "place": place})
    folds = [Fold("random", "random", None, 0, ""), Fold("time", "time", None, 0, "")]
    folds += [Fold(f"family/{g}/{r}", "family", g, r, "") for g in "abc" for r in range(4)]
    parts = pd.DataFrame({fold.name: pd.Categorical(["test"] * size) for fold in folds})
    scores = pd.concat(
        [
            pd.DataFrame({"fold": f.name, "flow": np.arange(size), "score": rng.random(size)}).assign(
                flagged=malicious, predicted=malicious
            )
            for f in folds
        ]
    ).astype({"fold": "category"})
    started = time.perf_counter()
    evaluate(
        flows,
        Splits(parts, tuple(folds), {}),
        {f"m{i}": scores for i in range(6)},
        {},
        titles={},
        uses_identity={},
        limit=0.5,
        data={},
    )
    assert time.perf_counter() - started < 10
