from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from flowsentry.reporting.metrics import areas, count, cumulative, rates, share


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=60))
def test_areas_are_those_of_scikit_learn_with_ties(rows):
    truth = np.array([malicious for malicious, _ in rows])
    score = np.array([float(value) for _, value in rows])
    roc_auc, average_precision = areas(truth, score)
    if truth.any():
        assert average_precision == pytest.approx(average_precision_score(truth, score))
    else:
        assert average_precision is None
    if truth.any() and not truth.all():
        assert roc_auc == pytest.approx(roc_auc_score(truth, score))
    else:
        assert roc_auc is None


def test_infinite_surprise_is_the_highest_score():
    truth, score = np.array([True, True, False, False]), np.array([np.inf, np.inf, 1.0, -np.inf])
    assert areas(truth, score) == (1.0, 1.0)


def test_cumulative_counts_flows_at_or_above_each_threshold():
    truth = np.array([True, False, True, False])
    thresholds, tp, fp = cumulative(truth, np.array([3.0, 3.0, 1.0, 0.0]))
    assert thresholds.tolist() == [3.0, 1.0, 0.0]
    assert tp.tolist() == [1, 2, 2]
    assert fp.tolist() == [1, 1, 2]


def test_confusion_matrix_and_rates_by_hand():
    truth = np.array([True] * 4 + [False] * 6)
    flagged = np.array([True, True, True, False] + [True] + [False] * 5)
    counts = count(truth, flagged)
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (3, 1, 5, 1)
    found = rates(counts, truth, flagged.astype(float))
    assert found.accuracy == 0.8
    assert found.recall == 0.75
    assert found.precision == 0.75
    assert found.f1 == 0.75
    assert found.fpr == pytest.approx(1 / 6)
    assert found.balanced_accuracy == pytest.approx((3 / 4 + 5 / 6) / 2)


def test_rates_without_positives_are_undefined_not_zero():
    truth = np.zeros(3, bool)
    found = rates(count(truth, truth), truth, np.zeros(3))
    assert found.recall is found.precision is found.f1 is found.balanced_accuracy is None
    assert found.roc_auc is found.average_precision is None
    assert (found.accuracy, found.fpr) == (1.0, 0.0)


def test_rates_without_negatives_and_without_flows():
    truth = np.ones(2, bool)
    found = rates(count(truth, ~truth), truth, np.zeros(2))
    assert (found.recall, found.f1, found.fpr, found.roc_auc) == (0.0, 0.0, None, None)
    empty = np.zeros(0, bool)
    assert set(rates(count(empty, empty), empty, np.zeros(0)).model_dump().values()) == {None}
    assert share(0, 0).rate is None
