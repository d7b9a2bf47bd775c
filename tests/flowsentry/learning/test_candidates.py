from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from flowsentry.detector import Detector, effect
from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features.splits import Fold
from flowsentry.features.views import FeatureSet
from flowsentry.learning import candidates
from flowsentry.learning.candidates import (
    SCORED_PARTS,
    Candidate,
    Recipe,
    fit_fold,
    judge_baselines,
    score_fold,
    train,
)
from flowsentry.learning.families import FAMILIES
from flowsentry.learning.search import SearchResult, search

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

COLUMNS = {"fold": "category", "flow": "int64", "score": "float64", "flagged": "bool", "predicted": "bool"}


def folds(small: Small) -> dict[str, Fold]:
    """One fold of every protocol that the small recording allows."""
    found: dict[str, Fold] = {}
    for fold in small.splits.folds:
        found.setdefault(fold.protocol, fold)
    return found


def outside(small: Small, fold: Fold) -> np.ndarray:
    """Bool [flows]: neither fitted nor calibrated on."""
    part = small.splits.parts[fold.name]
    return ~part.isin(["fit", "calibration"]).to_numpy()


def with_values(features: FeatureSet, of_row: np.ndarray, values: np.ndarray | float) -> FeatureSet:
    """Other values in those rows."""
    names = features.manifest.names
    assert of_row.any()
    changed = np.where(of_row[:, None], np.asarray(values, np.float32), features.rows[names].to_numpy())
    rows = pd.DataFrame(changed, columns=names)
    rows.insert(0, "flow", features.rows["flow"].to_numpy())
    return replace(features, rows=rows)


def other_labels(flows: pd.DataFrame, changed: np.ndarray) -> pd.DataFrame:
    """Every label of those flows turned round, and every group another one."""
    flows = flows.copy()
    for column in ("label", "corrected"):
        turned = flows[column].astype(str).map({"benign": "malicious", "malicious": "benign"})
        flows[column] = flows[column].astype(str).mask(changed, turned).astype("category")
    flows["group"] = flows["group"].astype(object).mask(changed, "unheard-of").astype("category")
    return flows


def learned(result: SearchResult, detector: Detector, folder: Path) -> dict[str, Any]:
    """Everything that came of the training, to the bit."""
    detector.save(folder)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # skops writes the time into its archive; its content is compared by the scores below
    kept = {path: content for path, content in files.items() if path.parent.name != "model"}
    trials = [{**asdict(trial), "seconds": None} for trial in result.trials]
    return {"files": kept, "trials": trials, "best": result.best, "params": detector.model.params}


@pytest.mark.parametrize("family", ["decision_tree", "logistic_regression", "tails"])
@pytest.mark.parametrize("protocol", ["random", "time", "family"])
def test_what_is_learned_does_not_depend_on_flows_outside_the_training(
    small: Small, recipe: Recipe, tmp_path: Path, protocol: str, family: str
) -> None:
    fold = folds(small)[protocol]
    features, untouched = small.views["behaviour"], outside(small, fold)
    assert untouched.any()
    of_row = untouched[features.rows["flow"].to_numpy()]
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 1000, (len(of_row), len(features.manifest.names))).astype(np.float32)
    before = fit_fold(FAMILIES[family], features, small.flows, small.splits, fold, recipe)
    after = fit_fold(
        FAMILIES[family],
        with_values(features, of_row, noise),
        other_labels(small.flows, untouched),
        small.splits,
        fold,
        recipe,
    )
    assert learned(*after, tmp_path / "after") == learned(*before, tmp_path / "before")
    assert after[1].score(features.rows).tobytes() == before[1].score(features.rows).tobytes()
    assert after[1].limit == before[1].limit


def test_what_is_learned_does_depend_on_the_training_rows(small: Small, recipe: Recipe, tmp_path: Path) -> None:
    fold = folds(small)["random"]
    features, trained_on = small.views["behaviour"], ~outside(small, fold)
    noise = with_values(features, trained_on[features.rows["flow"].to_numpy()], 1.0)
    before = fit_fold(FAMILIES["tails"], features, small.flows, small.splits, fold, recipe)
    after = fit_fold(FAMILIES["tails"], noise, small.flows, small.splits, fold, recipe)
    assert learned(*after, tmp_path / "after") != learned(*before, tmp_path / "before")


@pytest.mark.parametrize("family", ["logistic_regression", "tails"])
def test_no_row_of_a_held_out_group_reaches_a_fit(small: Small, recipe: Recipe, family: str) -> None:
    """Values that no model accepts would be noticed."""
    tried = [fold for fold in small.splits.folds if fold.held_out is not None]
    assert len(tried) >= 5
    for fold in tried:
        features = small.views["behaviour"]
        held_out = small.flows["group"].eq(fold.held_out).fillna(False).to_numpy(bool)
        assert held_out.any()
        poisoned = with_values(features, held_out[features.rows["flow"].to_numpy()], np.nan)
        _, detector = fit_fold(FAMILIES[family], poisoned, small.flows, small.splits, fold, recipe)
        assert np.isfinite(detector.score(features.rows)).all()
        parts = small.splits.parts.loc[held_out, fold.name]
        assert set(parts) & {"test"}
        assert not set(parts) & {"fit", "calibration"}


def test_the_chosen_labels_are_learned_from(small: Small, recipe: Recipe) -> None:
    fold = folds(small)["random"]
    flows = small.flows.assign(corrected=other_labels(small.flows, np.ones(len(small.flows), bool))["corrected"])
    published, corrected = (
        fit_fold(
            FAMILIES["decision_tree"],
            small.views["behaviour"],
            flows,
            small.splits,
            fold,
            recipe.model_copy(update={"labels": labels, "metric": "accuracy"}),
        )[1].judge(small.views["behaviour"].rows)[1]
        for labels in ("published", "corrected")
    )
    assert (published != corrected).mean() > 0.9


def test_calibration_takes_no_flow_that_is_labelled_malicious(small: Small, recipe: Recipe) -> None:
    fold = folds(small)["random"]
    part = small.splits.parts[fold.name].eq("calibration").to_numpy()
    bad = part & small.flows["corrected"].eq("malicious").to_numpy()
    assert bad.any()
    features = small.views["behaviour"]
    poisoned = with_values(features, bad[features.rows["flow"].to_numpy()], np.nan)
    _, detector = fit_fold(FAMILIES["tails"], poisoned, small.flows, small.splits, fold, recipe)
    assert np.isfinite(detector.tail.scores).all()


@pytest.fixture(scope="module")
def candidate(small: Small, recipe: Recipe) -> Candidate:
    return train(FAMILIES["decision_tree"], small.views["behaviour"], small.flows, small.splits, recipe)


def test_every_judged_flow_has_one_row_in_every_fold(small: Small, candidate: Candidate) -> None:
    assert candidate.scores.dtypes.astype(str).to_dict() == COLUMNS
    assert list(candidate.scores["fold"].cat.categories) == sorted(fold.name for fold in small.splits.folds)
    for fold in small.splits.folds:
        scored = candidate.scores.loc[candidate.scores["fold"] == fold.name, "flow"].tolist()
        expected = [flow for part in SCORED_PARTS for flow in small.splits.rows(fold, part)]
        assert sorted(scored) == sorted(expected)
        assert len(set(scored)) == len(scored)
    assert (candidate.scores["flagged"] == (candidate.scores["score"] >= 3)).all()


def test_the_score_of_a_flow_is_that_of_its_worst_report(small: Small, candidate: Candidate) -> None:
    (fold,) = small.splits.of("random")
    rows = small.views["behaviour"].rows
    own = pd.Series(candidate.detector.score(rows)).groupby(rows["flow"]).max()
    table = candidate.scores[candidate.scores["fold"] == "random"].set_index("flow")
    assert (table["score"] == own.loc[table.index]).all()
    assert rows["flow"].duplicated().any()
    again = score_fold(candidate.detector, small.views["behaviour"], small.splits, fold)
    assert again.set_index("flow")["score"].equals(table["score"])


def test_what_ships_is_the_fit_of_the_random_split(small: Small, recipe: Recipe, candidate: Candidate) -> None:
    (fold,) = small.splits.of("random")
    result, detector = fit_fold(
        FAMILIES["decision_tree"], small.views["behaviour"], small.flows, small.splits, fold, recipe
    )
    rows = small.views["behaviour"].rows
    assert candidate.detector.score(rows).tobytes() == detector.score(rows).tobytes()
    assert candidate.search.best == result.best == candidate.fold_params["random"]
    assert set(candidate.fold_params) == {fold.name for fold in small.splits.folds}


def test_training_twice_gives_the_same(small: Small, recipe: Recipe, candidate: Candidate) -> None:
    told: list[str] = []
    again = train(FAMILIES["decision_tree"], small.views["behaviour"], small.flows, small.splits, recipe, told.append)
    pd.testing.assert_frame_equal(again.scores, candidate.scores, check_exact=True)
    assert again.fold_params == candidate.fold_params
    assert len(told) == len(small.splits.folds)


def test_a_stored_candidate_is_the_same_again(small: Small, candidate: Candidate, tmp_path: Path) -> None:
    candidate.save(tmp_path / "it")
    loaded = Candidate.load(tmp_path / "it")
    pd.testing.assert_frame_equal(loaded.scores, candidate.scores, check_exact=True)
    assert loaded.search == candidate.search
    assert (loaded.family, loaded.fold_params, loaded.seconds) == (
        candidate.family,
        candidate.fold_params,
        candidate.seconds,
    )
    rows = small.views["behaviour"].rows
    assert loaded.detector.score(rows).tobytes() == candidate.detector.score(rows).tobytes()


@pytest.mark.parametrize("file", ["candidate.json", "scores.parquet", "detector/view.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_damaged_candidate_is_one_line(
    candidate: Candidate, tmp_path: Path, file: str, content: bytes | None
) -> None:
    candidate.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Candidate.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_without_the_protocol_random_nothing_can_ship(small: Small, recipe: Recipe) -> None:
    splits = replace(
        small.splits,
        folds=tuple(fold for fold in small.splits.folds if fold.protocol != "random"),
        impossible={"random": "3 benign exchanges are too few"},
    )
    with pytest.raises(ProtocolError, match="random, whose fit ships, is impossible: 3 benign exchanges are too few"):
        train(FAMILIES["tails"], small.views["behaviour"], small.flows, splits, recipe)


@pytest.mark.parametrize("view", ["behaviour", "paper"])
def test_baselines_are_judged_on_the_same_flows_as_candidates(small: Small, recipe: Recipe, view: str) -> None:
    splits = small.splits if view == "behaviour" else small.paper_splits
    judged = judge_baselines(small.views[view], small.flows, splits, recipe)
    assert list(judged) == ["constant", "best_column", "port_rule", "flow_id", "timestamp"]
    for name, (baseline, scores) in judged.items():
        assert baseline.name == name
        assert scores.dtypes.astype(str).to_dict() == COLUMNS
        for fold in splits.folds:
            part = splits.parts[fold.name]
            assert (
                scores.loc[scores["fold"] == fold.name, "flow"].tolist()
                == np.flatnonzero(part.isin(SCORED_PARTS)).tolist()
            )
        assert (scores["flagged"] == (scores["score"] >= 3)).all()


def test_baselines_do_not_depend_on_flows_outside_the_training(small: Small, recipe: Recipe) -> None:
    fold = folds(small)["random"]
    splits = replace(small.splits, folds=(fold,))
    before = judge_baselines(small.views["behaviour"], small.flows, splits, recipe)
    after = judge_baselines(small.views["behaviour"], other_labels(small.flows, outside(small, fold)), splits, recipe)
    for name, (baseline, scores) in before.items():
        assert after[name][0].learned == baseline.learned
        pd.testing.assert_frame_equal(after[name][1], scores, check_exact=True)


@pytest.mark.parametrize(
    ("labels", "counts"),
    [(None, "0 are labelled benign and 0 malicious"), ("benign", r"[\d,]+ are labelled benign and 0 malicious"),
     ("malicious", r"0 are labelled benign and [\d,]+ malicious")],
)  # fmt: skip
def test_flows_of_one_class_or_none_cannot_train_and_the_error_says_what_can(
    small: Small, recipe: Recipe, labels: str | None, counts: str
) -> None:
    flows = small.flows.assign(corrected=pd.Categorical([labels] * len(small.flows)))
    expected = f"of [\\d,]+ flows {counts}; give flows with both labels"
    with pytest.raises(ProtocolError, match=expected):
        train(FAMILIES["tails"], small.views["behaviour"], flows, small.splits, recipe)


def test_a_fold_that_cannot_be_trained_is_named(small: Small, recipe: Recipe) -> None:
    fit = small.splits.rows("random", "fit")
    flows = small.flows.copy()
    flows.loc[fit, "corrected"] = "benign"
    with pytest.raises(ProtocolError, match=r"random: .*no malicious flow"):
        train(FAMILIES["decision_tree"], small.views["behaviour"], flows, small.splits, recipe)


def test_the_search_looks_at_the_configured_limit(
    small: Small, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spy(*args: Any, **settings: Any) -> SearchResult:
        asked.append(settings["target_fpr"])
        return search(*args, **settings)

    monkeypatch.setattr(candidates, "search", spy)
    for target in (0.01, 0.002):
        changed = recipe.model_copy(update={"target_fpr": target})
        fit_fold(
            FAMILIES["tails"], small.views["behaviour"], small.flows, small.splits, folds(small)["random"], changed
        )
    assert asked == [0.01, 0.002]


def test_a_baseline_flags_nothing_without_a_minimum_effect(small: Small, recipe: Recipe) -> None:
    features = small.views["behaviour"]
    names = features.manifest.names
    has_effect = effect(
        features.rows.groupby("flow")[names].max().reindex(small.flows.index), features.manifest.features
    )
    flagged = 0
    for _, scores in judge_baselines(features, small.flows, small.splits, recipe).values():
        assert has_effect[scores.loc[scores["flagged"], "flow"].to_numpy()].all()
        flagged += int(scores["flagged"].sum())
    assert flagged > 0


def test_the_best_single_column_is_none_that_the_view_calls_an_identity(small: Small, recipe: Recipe) -> None:
    view = small.views["paper"]
    identities = {feature.name for feature in view.manifest.features if feature.identity}
    assert identities == {"flow_id", "src_ip", "dst_ip", "time", "dst_port", "src_port"}
    only_ports = replace(view, rows=view.rows.assign(dst_port=small.flows["label"].eq("malicious").astype(float)))
    best, _ = judge_baselines(only_ports, small.flows, small.paper_splits, recipe)["best_column"]
    assert not any(name in best.learned for name in identities)
