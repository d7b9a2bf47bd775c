import numpy as np
import pytest

from flowsentry.errors import ProtocolError, StoreError
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import FAMILIES, fit
from flowsentry.learning.model import Model

EFFECTS = EffectSizes(np.array([0.5, np.nan, 0.2]), np.array([4.0, 1.0, 10.0]))
X = np.array([[0.5, 9.0, 0.0], [0.75, 0.0, 0.0], [0.0, 0.0, 0.4], [0.0, 99.0, 0.0]])
BENIGN = np.zeros(4, bool)


def fitted() -> Model:
    return fit(FAMILIES["effects"], {}, X, BENIGN, [1, 1, 1], 0, effects=EFFECTS)


def test_the_score_is_the_greatest_excess_over_a_minimum_effect_in_units_of_the_view() -> None:
    assert fitted().score(X) == pytest.approx([0.0, 1.0, 2.0, -2.0])


def test_a_feature_without_a_minimum_effect_never_counts() -> None:
    changed = X.copy()
    changed[:, 1] = 1e6
    assert fitted().score(changed).tolist() == fitted().score(X).tolist()


def test_the_score_does_not_depend_on_the_rows_that_it_was_fitted_on() -> None:
    other = fit(FAMILIES["effects"], {}, X[::-1] * 7, BENIGN, [1, 1, 1], 0, effects=EFFECTS)
    assert other.score(X).tolist() == fitted().score(X).tolist()


def test_a_view_without_minimum_effects_is_refused_with_the_remedy() -> None:
    none = EffectSizes(np.full(3, np.nan), np.ones(3))
    for effects in (None, none):
        with pytest.raises(ProtocolError, match="leave the family effects out"):
            fit(FAMILIES["effects"], {}, X, BENIGN, [1, 1, 1], 0, effects=effects)


def test_it_is_stored_as_plain_arrays_and_scores_the_same_when_loaded(tmp_path) -> None:
    fitted().save(tmp_path)
    assert (tmp_path / "model.npz").is_file()
    assert Model.load(tmp_path).score(X).tolist() == fitted().score(X).tolist()


def test_arrays_of_another_width_are_refused(tmp_path) -> None:
    Model("effects", {}, EffectSizes(np.zeros(2), np.ones(2)), 3, 0.0).save(tmp_path)
    with pytest.raises(StoreError, match="effect sizes do not fit"):
        Model.load(tmp_path)
