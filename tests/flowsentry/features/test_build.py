from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from flowsentry.features import behaviour, paper
from flowsentry.features import build as building
from flowsentry.features.build import VIEWS, build

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_view_is_its_values_and_what_they_are(small: Small, view: str) -> None:
    features = build(view, small.reports, small.flows, {"file x": "abc"})
    module = VIEWS[view]
    manifest = features.manifest
    assert (manifest.name, manifest.version, manifest.features) == (view, module.VERSION, module.FEATURES)
    assert manifest.lineage == {"file x": "abc"}
    assert manifest.warm_up_seconds == module.WARM_UP_SECONDS
    assert list(features.rows) == ["flow", *manifest.names]
    expected = small.flows.index if view == "paper" else small.reports["flow"]
    assert features.rows["flow"].tolist() == expected.tolist()
    assert features.rows["flow"].dtype == np.int64


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_the_digest_is_of_the_values_not_of_where_they_came_from(small: Small, view: str) -> None:
    digest = small.views[view].manifest.digest
    assert len(digest) == 64
    assert build(view, small.reports, small.flows, {"file y": "other"}).manifest.digest == digest


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_the_digest_changes_with_one_value(small: Small, view: str) -> None:
    row = len(small.reports) // 2
    reports = small.reports.copy()
    reports.loc[row, "bytes"] += 10_000_000
    reports.loc[row, "transport"] = "tcp"
    flows = small.flows.copy()
    flows.loc[7, "bytes"] += 1
    assert build(view, reports, flows, {}).manifest.digest != small.views[view].manifest.digest


def test_the_digest_changes_with_the_order_of_the_rows(small: Small) -> None:
    rows = small.views["paper"].rows
    assert building._digest("paper", "1", paper.FEATURES, rows.iloc[::-1]) != small.views["paper"].manifest.digest


@pytest.mark.parametrize(
    "change", [{"unit": "m"}, {"description": "another"}, {"harm": 0}, {"minimum_effect": 3.0}, {"name": "another"}]
)
def test_the_digest_changes_with_the_definition(
    small: Small, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    first, *others = behaviour.FEATURES
    if "name" in change:  # the values' names have to follow
        rows = small.views["behaviour"].rows.rename(columns={first.name: "another"})
    else:
        rows = small.views["behaviour"].rows
    changed = (first.model_copy(update=change), *others)
    assert building._digest("behaviour", behaviour.VERSION, changed, rows) != small.views["behaviour"].manifest.digest


def test_the_digest_changes_with_the_version(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "VERSION", "next")
    features = build("behaviour", small.reports, small.flows, {})
    assert features.manifest.version == "next"
    assert features.manifest.digest != small.views["behaviour"].manifest.digest


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_statistics_are_those_of_the_values(small: Small, view: str) -> None:
    features = small.views[view]
    numbers = [feature.name for feature in features.manifest.features if feature.kind != "category"]
    assert sorted(features.manifest.statistics) == sorted(numbers)
    for name in numbers:
        values, told = features.rows[name].astype("float64"), features.manifest.statistics[name]
        assert list(told) == ["count", "mean", "std", "min", "q01", "q25", "q50", "q75", "q99", "max"]
        assert told["count"] == len(values)
        assert told["mean"] == pytest.approx(values.mean())
        assert told["std"] == pytest.approx(values.std(ddof=0))
        assert (told["min"], told["max"]) == (values.min(), values.max())
        assert told["q25"] == pytest.approx(values.quantile(0.25))
        assert told["min"] <= told["q01"] <= told["q50"] <= told["q99"] <= told["max"]


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_view_of_nothing_has_no_statistics(small: Small, view: str) -> None:
    features = build(view, small.reports.head(0), small.flows.head(0), {})
    assert len(features.rows) == 0
    assert features.manifest.statistics == {}
    assert list(features.rows) == ["flow", *features.manifest.names]
