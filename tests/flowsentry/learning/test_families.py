from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from flowsentry.errors import ProtocolError
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import FAMILIES, TAILS_QUANTILE, fit, sample


def rows(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    X = random.normal(size=(n, 3))
    return X, X[:, 0] - X[:, 2] + random.normal(size=n) > 0


def test_the_grids_of_the_study_have_its_72_candidates() -> None:
    sizes = {name: len(FAMILIES[name].candidates) for name in ("logistic_regression", "svc", "knn", "decision_tree")}
    assert sizes == {"logistic_regression": 9, "svc": 27, "knn": 12, "decision_tree": 24}


def test_candidates_are_all_different_and_in_the_order_of_the_grid() -> None:
    for family in FAMILIES.values():
        assert len({tuple(params.items()) for params in family.candidates}) == len(family.candidates)
    assert FAMILIES["logistic_regression"].candidates[:2] == (
        {"C": 0.1, "solver": "newton-cg"},
        {"C": 0.1, "solver": "lbfgs"},
    )


EFFECTS = EffectSizes(np.array([1.0, np.nan, np.nan]), np.ones(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_attacks_apart_and_the_same_seed_gives_the_same_scores(name: str) -> None:
    family = FAMILIES[name]
    X, y = rows()
    one, two = (fit(family, family.candidates[0], X, y, [1, 0, -1], 3, effects=EFFECTS) for _ in range(2))
    assert (one.score(X) == two.score(X)).all()
    assert one.score(X)[y].mean() > one.score(X)[~y].mean()


def test_boosting_never_scores_more_harm_lower() -> None:
    X, y = rows()
    family = FAMILIES["gradient_boosting"]
    model = fit(family, family.candidates[0], X, y, [1, 0, -1], 0)
    worse = X + np.array([1.0, 0.0, -1.0])
    assert (model.score(worse) >= model.score(X)).all()
    assert (model.score(worse) > model.score(X)).any()


def test_tails_learn_nothing_from_malicious_rows() -> None:
    X, y = rows()
    family = FAMILIES["tails"]
    changed = np.where(y[:, None], 1e6, X)
    one, two = (fit(family, family.candidates[0], rows, y, [1, 0, -1], 0) for rows in (X, changed))
    assert (one.score(X) == two.score(X)).all()
    assert (one.score(X[~y]) <= one.boundary).mean() == pytest.approx(TAILS_QUANTILE, abs=1 / (~y).sum())


@pytest.mark.parametrize(("name", "y"), [("knn", False), ("knn", True), ("tails", True)])
def test_a_missing_class_is_named(name: str, y: bool) -> None:
    X, _ = rows(20)
    family = FAMILIES[name]
    with pytest.raises(ProtocolError, match="no benign" if y else "no malicious"):
        fit(family, family.candidates[0], X, np.full(20, y), [0, 0, 0], 0)


def test_tails_need_no_attack() -> None:
    X, _ = rows(50)
    model = fit(FAMILIES["tails"], {"combine": "sum"}, X, np.zeros(50, bool), [1, 1, 1], 0)
    assert model.score(X + 10).min() > model.score(X).max()


def test_more_rows_than_the_cap_are_sampled_and_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    X, y = rows(400)
    family = replace(FAMILIES["knn"], row_cap=100)
    with caplog.at_level(logging.INFO):
        model = fit(family, family.candidates[0], X, y, [0, 0, 0], 0)
    assert model.estimator.n_samples_fit_ == pytest.approx(100, abs=2)
    assert "of 400 rows" in caplog.text


def test_a_sample_keeps_the_share_of_classes_and_takes_exchanges_whole() -> None:
    exchange = np.repeat(np.arange(1000), 3)
    y = np.repeat(np.arange(1000) < 100, 3)
    chosen = sample(y, 300, 0, exchange)
    assert len(chosen) == pytest.approx(300, abs=6)
    assert y[chosen].mean() == pytest.approx(0.1, abs=0.01)
    assert (np.bincount(exchange[chosen], minlength=1000) % 3 == 0).all()
    assert (np.diff(chosen) > 0).all()
    assert (sample(y, 300, 0, exchange) == chosen).all()
    assert not np.array_equal(sample(y, 300, 1, exchange), chosen)


def test_a_sample_has_at_least_one_row_of_a_rare_class() -> None:
    y = np.zeros(1000, bool)
    y[7] = True
    assert 7 in sample(y, 20, 0)
