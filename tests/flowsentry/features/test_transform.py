from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from flowsentry.features.transform import Transform
from flowsentry.features.views import Feature

NUMBER = Feature(name="n", unit="", description="")
FLAG = Feature(name="f", unit="", description="", kind="flag")
TEXT = Feature(name="t", unit="", description="", kind="category")
FEATURES = (NUMBER, FLAG, TEXT)
ROWS = pd.DataFrame({"flow": range(4), "n": [0, 1, 3, 7], "f": [0.0, 1, 1, 0], "t": ["b", "d", "b", "f"]})


def test_fitted_rows_become_0_to_1_and_texts_their_rank() -> None:
    done = Transform.fit(ROWS, FEATURES, "linear").apply(ROWS)
    assert done.dtype == np.float64
    assert done.tolist() == [[0, 0, 0], [1 / 7, 1, 0.5], [3 / 7, 1, 0], [1, 0, 1]]


def test_counts_are_brought_to_their_logarithm_first() -> None:
    done = Transform.fit(ROWS, FEATURES, "log").apply(ROWS)
    assert done[:, 0] == pytest.approx(np.log2(1 + ROWS["n"]) / 3)


def test_rows_beyond_the_fitted_ones_go_beyond_0_and_1() -> None:
    transform = Transform.fit(ROWS, FEATURES, "linear")
    beyond = pd.DataFrame({"n": [14, -7], "f": [0, 0], "t": ["b", "b"]})
    assert transform.apply(beyond)[:, 0].tolist() == [2, -1]


def test_an_unknown_text_stands_where_it_would_be_sorted_and_a_missing_one_before_all() -> None:
    transform = Transform.fit(ROWS, (TEXT,), "linear")
    strange = pd.DataFrame({"t": pd.array(["a", "b", "c", "d", "e", "f", "g", None], "string[pyarrow]")})
    assert transform.apply(strange)[:, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1, 1.5, -0.5]


def test_texts_are_ranked_alike_as_strings_and_as_categories() -> None:
    transform = Transform.fit(ROWS, (TEXT,), "linear")
    text = pd.Series(["f", "zz", None, "a", "d"])
    as_strings = transform.apply(pd.DataFrame({"t": text.astype("string[pyarrow]")}))
    assert (transform.apply(pd.DataFrame({"t": text.astype("category")})) == as_strings).all()


def test_a_constant_feature_keeps_its_unit() -> None:
    transform = Transform.fit(ROWS.assign(n=5), (NUMBER,), "linear")
    assert transform.apply(pd.DataFrame({"n": [5, 7]}))[:, 0].tolist() == [0, 2]


def test_a_row_is_transformed_alike_with_any_other_rows() -> None:
    transform = Transform.fit(ROWS, FEATURES, "log")
    alone = np.concatenate([transform.apply(ROWS.iloc[[i]]) for i in range(len(ROWS))])
    assert (alone == transform.apply(ROWS)).all()
    assert transform.apply(ROWS.head(0)).shape == (0, 3)


def test_rows_are_not_changed() -> None:
    before = ROWS.copy()
    Transform.fit(ROWS, FEATURES, "log").apply(ROWS)
    pd.testing.assert_frame_equal(ROWS, before)


def test_json_keeps_every_bit() -> None:
    transform = Transform.fit(ROWS.assign(n=np.random.default_rng(0).normal(size=4) ** 2), FEATURES, "log")
    again = Transform.model_validate_json(transform.model_dump_json())
    assert again == transform
    assert again.apply(ROWS).tobytes() == transform.apply(ROWS).tobytes()


@pytest.mark.parametrize(
    "change",
    [{"low": [0.0]}, {"high": []}, {"ranks": {}}, {"ranks": {"t": ["a"], "n": []}}, {"low": [0, 0, float("nan")]}],
)
def test_a_transform_that_lacks_something_is_refused(change: dict[str, object]) -> None:
    stored = json.loads(Transform.fit(ROWS, FEATURES, "linear").model_dump_json())
    with pytest.raises(ValidationError):
        Transform.model_validate(stored | change)
