from __future__ import annotations

import math

import pytest
from pydantic import BaseModel, ConfigDict

from flowsentry.learning.selection import Ranked, Selection
from materializers import ModelMaterializer
from tests.materializers.conftest import RoundTrip


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    names: tuple[str, ...]
    value: float | None


@pytest.mark.parametrize("value", [None, 0.1 + 0.2, -0.0, 5e-324])
def test_a_strict_model_with_tuples_is_the_same_again(round_trip: RoundTrip, value: float | None) -> None:
    model = Strict(names=("é", "b"), value=value)
    loaded, folder = round_trip(ModelMaterializer, model)
    assert loaded == model
    assert repr(loaded.value) == repr(value)
    assert [path.name for path in folder.iterdir()] == ["model.json"]


def test_a_decision_keeps_its_ranking(round_trip: RoundTrip) -> None:
    ranked = Ranked(name="a", title="A", baseline=False, value=math.pi, worst=None, fpr=0.0, excluded=None)
    selection = Selection(
        chosen=None, reason="nothing", protocol="family", metric="recall", labels="corrected", ranking=(ranked,)
    )
    loaded, _ = round_trip(ModelMaterializer, selection)
    assert loaded == selection
