from __future__ import annotations

import json

import pytest

from flowsentry.features.views import Feature, ViewManifest
from flowsentry.learning.selection import choose
from flowsentry.reporting.evaluation import validation_scores
from flowsentry.reporting.model_card import model_card, model_card_html

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def manifest():
    return ViewManifest(
        name="paper",
        version="1",
        features=(Feature(name="bytes", unit="bytes", description=""),),
        warm_up_seconds=1800,
        digest="ab" * 32,
        lineage={"flows.csv": "cd" * 32},
        statistics={},
    )


@pytest.fixture
def card(evaluation, flows, splits, model_scores, manifest):
    selection = choose(evaluation, protocol="random", metric="accuracy", labels="corrected")
    validation = validation_scores(flows, splits, {"decision_tree": model_scores})["decision_tree"]
    return model_card(
        evaluation=evaluation,
        selection=selection,
        manifest=manifest,
        parameters={"max_depth": 3, "note": EVIL},
        rows={"fit": 6, "calibration": 1},
        target_fpr=0.01,
        validation=validation,
    )


def test_card_holds_the_figures(card):
    assert card["model"]["family"] == "decision_tree"
    assert card["protocols"]["family"]["corrected"]["families"]["shell"]["mean"] == pytest.approx(0.5)
    assert card["protocols"]["random"]["published"]["rates"]["fpr"] == {"mean": 0.5, "worst": 0.5}
    assert card["validation"]["corrected"]["counts"] == {"tp": 1, "fp": 0, "tn": 1, "fn": 0}
    assert card["limit"] == {"surprise": 2.0, "target_fpr": 0.01}
    assert card["data"]["rows"] == {"fit": 6, "calibration": 1}


def test_card_is_json_with_null_for_the_undefined(card):
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_baselines_say_whether_they_were_beaten(card):
    assert [(b["name"], b["beaten"], b["uses_identity"]) for b in card["baselines"]] == [
        ("constant", True, False),
        ("flow_id", False, True),
    ]
    assert card["baselines"][0]["value"] == pytest.approx(0.5)


def test_known_limits_come_from_the_measurements(card):
    text = "\n".join(card["limits"])
    assert "Misses much of shell when never trained on: recall 50.00 %, worst 33.33 % (3 flows)" in text
    assert "Misses much of flood" not in text
    assert "“victim”: 100.00 %" in text
    assert "about 25,000 would be flagged, in the worst fold 50,000" in text
    assert "Not tested under the protocol recording: there is one recording" in text
    assert "The first 1,800 s" in text


@pytest.mark.parametrize("effect", [None, 3.0])
def test_a_view_with_minimum_effects_says_where_they_come_from(
    evaluation, flows, splits, model_scores, manifest, effect
):
    feature = manifest.features[0].model_copy(update={"minimum_effect": effect})
    card = model_card(
        evaluation=evaluation,
        selection=choose(evaluation, protocol="random", metric="accuracy", labels="corrected"),
        manifest=manifest.model_copy(update={"features": (feature,)}),
        parameters={},
        rows={},
        target_fpr=0.01,
        validation=validation_scores(flows, splits, {"decision_tree": model_scores})["decision_tree"],
    )
    assert any("set by hand, on the recording of February 2022" in line for line in card["limits"]) == bool(effect)


def test_card_page_is_escaped_and_complete(card):
    page = model_card_html(card)
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    for part in ("Known limits", "Validation of the shipped fit", "Decision tree", "cd" * 32, "max_depth"):
        assert part in page


def test_no_card_without_a_selection(evaluation, manifest):
    nothing = choose(evaluation, protocol="recording", metric="accuracy", labels="corrected")
    with pytest.raises(ValueError, match="there is no model to describe"):
        model_card(
            evaluation=evaluation,
            selection=nothing,
            manifest=manifest,
            parameters={},
            rows={},
            target_fpr=0.01,
            validation={},
        )
