from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flowsentry.learning.tails import COMBINATIONS, KNOTS, SignedTails, Tail

VALUES = st.floats(-1e6, 1e6, allow_nan=False)


def surprise(benign: list[float] | np.ndarray, *values: float, sign: int = 1) -> np.ndarray:
    tail = Tail.fit(np.asarray(benign, float), 0, sign)
    return tail.surprise(np.array(values, float)[:, None])


def test_a_value_that_one_benign_row_in_ten_reaches_has_a_surprise_of_about_one() -> None:
    assert surprise(np.arange(1000), 900)[0] == pytest.approx(-np.log10(101 / 1001))


def test_ties_share_the_surprise_of_the_whole_tie() -> None:
    benign = [0.0] * 90 + [1.0] * 10
    assert surprise(benign, 0, 1) == pytest.approx([0, -np.log10(11 / 101)])


def test_lower_is_worse_where_the_sign_says_so() -> None:
    low, high = surprise(np.arange(1000), 0, 999, sign=-1)
    assert low > 2.5
    assert high == 0


@pytest.mark.parametrize("constant", [0.0, 5.0, 1e9, -3.0])
def test_a_feature_constant_in_training_is_neither_ignored_nor_explodes(constant: float) -> None:
    same, above, far = surprise([constant] * 999, constant, constant + 1, constant + 1e12)
    assert same == 0
    assert 3 <= above < 3.4
    assert above < far < 20


def test_beyond_the_worst_benign_value_ten_tail_widths_are_ten_times_as_rare() -> None:
    worst, beyond = surprise(np.arange(1001), 1000.0, 1000.0 + 9 * 500)
    assert beyond == pytest.approx(np.log10(1002) + 1)
    assert worst < beyond


@given(
    arrays.arrays(np.float64, st.integers(1, 40), elements=VALUES),
    arrays.arrays(np.float64, 30, elements=VALUES),
)
def test_more_harm_never_lowers_a_finite_score(benign: np.ndarray, values: np.ndarray) -> None:
    scores = surprise(benign, *np.sort(values))
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert (np.diff(scores) >= 0).all()


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_every_combination_is_monotone_in_every_feature(combine: str) -> None:
    random = np.random.default_rng(0)
    harm = np.array([1, -1, 1, 1], np.int8)
    tails = SignedTails.fit(random.normal(size=(300, 4)), harm)
    X = random.normal(size=(200, 4)) * 3
    worse = X + harm * random.exponential(size=(200, 4))
    assert (tails.score(worse, combine) >= tails.score(X, combine)).all()
    assert (tails.score(worse, combine) > tails.score(X, combine)).any()


def test_features_without_a_direction_are_left_out() -> None:
    random = np.random.default_rng(0)
    tails = SignedTails.fit(random.normal(size=(300, 2)), np.array([1, 0], np.int8))
    X = np.array([[0.0, 0.0], [0.0, 1e6]])
    first, second = tails.score(X, "sum")
    assert first == second


def test_where_no_direction_is_known_both_tails_count() -> None:
    random = np.random.default_rng(0)
    tails = SignedTails.fit(random.normal(size=(300, 2)), np.zeros(2, np.int8))
    ordinary, low, high = tails.score(np.array([[0.0, 0.0], [0.0, -50], [0.0, 50]]), "max")
    assert low > ordinary
    assert high > ordinary


def test_thinned_tails_are_exact_where_it_matters() -> None:
    benign = np.arange(100_000, dtype=np.float64)
    tail = Tail.fit(benign, 0, 1)
    assert len(tail.values) <= KNOTS
    x = np.array([0, 50_000, 99_000, 99_900, 99_999], dtype=np.float64)
    exact = -np.log10((1 + 100_000 - x) / 100_001)
    assert tail.surprise(x[:, None]) == pytest.approx(exact, abs=2e-3)
    assert tail.surprise(x[2:, None]) == pytest.approx(exact[2:], abs=1e-12)


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    arrays = SignedTails.fit(np.random.default_rng(0).normal(size=(50, 2)), np.array([1, 1], np.int8)).to_arrays()
    with pytest.raises(ValueError, match="add up"):
        SignedTails.from_arrays({**arrays, "values": arrays["values"][1:]})
    with pytest.raises(ValueError, match="no tail"):
        SignedTails.from_arrays({**arrays, "feature": arrays["feature"] + 7})
    with pytest.raises(ValueError, match="no tail"):
        SignedTails.from_arrays({**arrays, "values": arrays["values"][::-1]})
