from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GridSearchCV

from flowsentry.errors import ProtocolError
from flowsentry.learning import search as searching
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import FAMILIES, build
from flowsentry.learning.search import held_out_folds, measure, search, stratified_group_folds

HARM = np.array([1, 0, 0, -1], np.int8)


def rows(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, 4))
    return X, X[:, 0] * np.abs(X[:, 1]) - X[:, 3] + 0.5 * random.normal(size=n) > 0


def plain_scores(name: str, X: np.ndarray, y: np.ndarray, folds: list) -> dict[frozenset, float]:
    family = FAMILIES[name]
    grid = {parameter: list(values) for parameter, values in family.grid.items()}
    found = GridSearchCV(build(family, {}, HARM, 0), grid, scoring="accuracy", cv=folds, refit=False)
    found.fit(X, y.astype(np.int8))
    results = found.cv_results_
    return {frozenset(p.items()): s for p, s in zip(results["params"], results["mean_test_score"], strict=True)}


@pytest.mark.parametrize("name", ["logistic_regression", "svc", "knn", "decision_tree"])
def test_every_candidate_scores_as_in_a_plain_grid_search(name: str) -> None:
    X, y = rows()
    folds = stratified_group_folds(y, np.arange(len(y)), 3, 0)
    found = search(FAMILIES[name], X, y, harm=HARM, folds=folds, metric="accuracy", seed=0, target_fpr=0.005)
    expected = plain_scores(name, X, y, folds)
    assert len(found.trials) == len(expected)
    for trial in found.trials:
        assert trial.score == pytest.approx(expected[frozenset(trial.params.items())], abs=1e-12)
    assert found.score == max(expected.values())


@pytest.mark.parametrize("name", ["logistic_regression", "svc"])
def test_a_race_reaches_the_best_of_the_grid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "RUNGS", {name: (200, 400)})
    X, y = rows(1200)
    folds = stratified_group_folds(y, np.arange(len(y)), 3, 0)
    found = search(FAMILIES[name], X, y, harm=HARM, folds=folds, metric="accuracy", seed=0, target_fpr=0.005)
    assert found.score == pytest.approx(max(plain_scores(name, X, y, folds).values()), abs=1e-12)
    reached = [trial.rows for trial in found.trials]
    assert reached.count(800) <= len(reached) / 3
    assert min(reached) == pytest.approx(200, abs=2)


def test_ties_go_to_the_first_candidate() -> None:
    X, y = np.repeat([[0.0] * 4, [1.0] * 4], 60, axis=0), np.repeat([False, True], 60)
    folds = stratified_group_folds(y, np.arange(120), 3, 0)
    for name in ("decision_tree", "knn", "tails"):
        found = search(
            FAMILIES[name], X, y, harm=HARM, folds=folds, metric="average_precision", seed=0, target_fpr=0.005
        )
        assert found.score == 1.0
        assert found.best == FAMILIES[name].candidates[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_small_budget_stays_small_and_is_reproducible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "SMALL", 200)
    X, y = rows(1200)
    exchange = np.repeat(np.arange(600), 2)
    folds = stratified_group_folds(y, exchange, 3, 0)
    one, two = (
        search(
            FAMILIES[name],
            X,
            y,
            harm=HARM,
            folds=folds,
            metric="recall_at_fpr",
            seed=5,
            target_fpr=0.005,
            exchange=exchange,
            effects=EffectSizes(np.ones(len(HARM)), np.ones(len(HARM))),
            budget="small",
        )
        for _ in range(2)
    )
    assert [t.scores_per_fold for t in one.trials] == [t.scores_per_fold for t in two.trials]
    assert one.best == two.best
    assert max(trial.rows for trial in one.trials) <= 202


def test_a_row_cap_bounds_the_last_round() -> None:
    X, y = rows(900)
    folds = stratified_group_folds(y, np.arange(900), 3, 0)
    family = replace(FAMILIES["knn"], row_cap=300)
    found = search(family, X, y, harm=HARM, folds=folds, metric="accuracy", seed=0, target_fpr=0.005)
    assert {trial.rows for trial in found.trials} <= {299, 300, 301}


def test_progress_is_told_of_every_fit() -> None:
    X, y = rows(300)
    folds = stratified_group_folds(y, np.arange(300), 3, 0)
    told: list[tuple[int, int, str]] = []
    lock = threading.Lock()

    def tell(done: int, total: int, note: str) -> None:
        with lock:
            told.append((done, total, note))

    search(FAMILIES["knn"], X, y, harm=HARM, folds=folds, metric="accuracy", seed=0, target_fpr=0.005, on_progress=tell)
    assert sorted(done for done, _, _ in told) == list(range(1, 7))
    assert {total for _, total, _ in told} == {6}
    assert "12 candidates on 200 rows" in told[0][2]


def test_a_fold_of_one_class_is_named() -> None:
    X, y = rows(90)
    benign = np.flatnonzero(~y)
    with pytest.raises(ProtocolError, match="fold 1 has no malicious flow among its test rows"):
        search(
            FAMILIES["knn"],
            X,
            y,
            harm=HARM,
            folds=[(np.arange(90), benign)],
            metric="accuracy",
            seed=0,
            target_fpr=0.005,
        )
    with pytest.raises(ProtocolError, match="without a fold"):
        search(FAMILIES["knn"], X, y, harm=HARM, folds=[], metric="accuracy", seed=0, target_fpr=0.005)


def test_recall_at_fpr_breaks_ties_as_if_at_random() -> None:
    y = np.repeat([False, True], [1000, 50])
    constant = np.zeros(1050)
    assert measure("recall_at_fpr", y, constant, constant > 0, 0.01) == pytest.approx(0.01)
    perfect = y.astype(float)
    assert measure("recall_at_fpr", y, perfect, perfect > 0, 0.001) == 1.0
    half_under_noise = np.where(y, np.repeat([2.0, -1.0], [1025, 25]), 0.0)
    assert measure("recall_at_fpr", y, half_under_noise, y, 0.001) == pytest.approx(0.5, abs=0.01)


def test_accuracies_are_of_the_predictions_and_precision_of_the_order() -> None:
    y = np.array([False, False, False, True])
    scores, predicted = np.array([0.0, 1, 2, 3]), np.array([False, True, False, True])
    assert measure("accuracy", y, scores, predicted, 0.01) == 0.75
    assert measure("balanced_accuracy", y, scores, predicted, 0.01) == pytest.approx((1 + 2 / 3) / 2)
    assert measure("average_precision", y, scores, predicted, 0.01) == 1.0


def test_stratified_folds_keep_exchanges_whole_and_classes_even() -> None:
    random = np.random.default_rng(0)
    exchange = np.sort(random.integers(0, 900, 3000))
    y = exchange < 150
    folds = stratified_group_folds(y, exchange, 3, 0)
    assert np.array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(3000))
    for train, test in folds:
        assert not set(exchange[train]) & set(exchange[test])
        assert len(train) + len(test) == 3000
        assert y[test].mean() == pytest.approx(y.mean(), abs=0.01)
        assert len(test) == pytest.approx(1000, abs=20)


def attacks() -> tuple[np.ndarray, pd.Series, np.ndarray]:
    group = pd.Series([None] * 600 + ["flood"] * 100 + ["scan"] * 50 + ["shell"] * 20, dtype="category")
    exchange = np.concatenate([np.arange(600) // 2, 1000 + np.arange(170) // 2])
    exchange[:4] = 1000  # replies of the flood, labelled benign
    return group.notna().to_numpy(), group, exchange


def test_a_held_out_attack_is_tested_and_never_fitted_on_nor_its_exchanges() -> None:
    y, group, exchange = attacks()
    folds = held_out_folds(y, group, exchange, 3, 0)
    assert len(folds) == 3
    tested = set()
    for (train, test), name in zip(folds, ("flood", "scan", "shell"), strict=True):
        assert set(group[test].dropna()) == {name}
        assert set(group[train].dropna()) == {"flood", "scan", "shell"} - {name}
        assert not set(exchange[train]) & set(exchange[test])
        assert not set(range(4)) & set(test)
        assert (not set(range(4)) & set(train)) == (name == "flood")
        benign = set(test[~y[test]])
        assert len(benign) == pytest.approx(200, abs=3)
        assert not benign & tested
        tested |= benign


def test_more_groups_than_folds_are_held_out_together() -> None:
    y, group, exchange = attacks()
    folds = held_out_folds(y, group, exchange, 2, 0)
    assert [set(group[test].dropna()) for _, test in folds] == [{"flood", "shell"}, {"scan"}]
    assert [set(group[train].dropna()) for train, _ in folds] == [{"scan"}, {"flood", "shell"}]


def test_one_group_of_attacks_cannot_be_held_out() -> None:
    _, group, exchange = attacks()
    only = group.where(group == "flood")
    with pytest.raises(ProtocolError, match="found flood"):
        held_out_folds(only.notna().to_numpy(), only, exchange, 3, 0)
