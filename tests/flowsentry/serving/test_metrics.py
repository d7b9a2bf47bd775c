from __future__ import annotations

import numpy as np
import pytest

from flowsentry.serving.metrics import SCORES, _Histogram


@pytest.mark.parametrize("count", [0, 1, 16, 17, 500])
def test_a_histogram_counts_one_by_one_and_all_at_once_the_same(count: int) -> None:
    values = np.random.default_rng(count).choice([*SCORES, 0.25, 3.3, 11.9, 13.0], count)
    single, together = _Histogram(SCORES), _Histogram(SCORES)
    for value in values.tolist():
        single.add(value)
    together.add_all(values)
    assert single.counts == together.counts
    assert single.sum == pytest.approx(together.sum)


def test_the_buckets_of_a_histogram_hold_what_is_at_most_their_bound() -> None:
    histogram = _Histogram((1.0, 2.0))
    histogram.add_all(np.array([0.5, 1.0, 1.5, 2.0, 9.0]))
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
