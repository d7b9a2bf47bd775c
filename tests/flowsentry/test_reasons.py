from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowsentry import detector as detectors
from flowsentry import reasons
from flowsentry.detector import Detector
from flowsentry.features import behaviour, paper
from flowsentry.features.transform import Transform
from flowsentry.features.views import ViewManifest
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.families import FAMILIES, Family
from flowsentry.learning.model import Parameters, node_scores
from flowsentry.reasons import MOST, Reason, explain

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

NAMES = [feature.name for feature in behaviour.FEATURES]
FAST = ("logistic_regression", "decision_tree", "effects", "tails")
SLOW = ("gradient_boosting", "svc", "knn")
LAST = {name: family.candidates[-1] for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def trained(small: Small) -> dict[tuple[str, str], Detector]:
    """A detector of every family and view, flagging freely; statistics are those of the benign rows."""
    found = {}
    for view, features in small.views.items():
        rows = features.rows
        malicious = is_malicious(small.flows["label"])[rows["flow"].to_numpy()]
        manifest = features.manifest.model_copy(update={"statistics": statistics(rows[~malicious])})
        kept = np.sort(np.random.default_rng(0).permutation(len(rows))[:1500])
        for name, family in FAMILIES.items():
            if (view, name) != ("paper", "effects"):
                found[view, name] = fitted(
                    family,
                    LAST[name],
                    manifest,
                    rows.iloc[kept],
                    malicious[kept],
                    kept,
                    rows[~malicious],
                    target_fpr=0.05,
                    needs_effect=False,
                    seed=0,
                )
    return found


def fitted(family: Family, params: Parameters, manifest: ViewManifest, *rest: Any, **options: Any) -> Detector:
    """Fitted, with the statistics of this manifest."""
    return replace(detectors.fit(family, params, manifest, *rest, **options), manifest=manifest)


def statistics(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    numbers = rows.drop(columns="flow", errors="ignore").select_dtypes("number").astype("float64")
    return {
        name: {"q01": float(low), "q50": float(middle), "q99": float(high)}
        for name, (low, middle, high) in numbers.quantile([0.01, 0.5, 0.99]).items()
    }


def flagged(small: Small, detector: Detector, most: int) -> pd.DataFrame:
    rows = small.views[detector.manifest.name].rows[detector.manifest.names]
    found = rows[detector.score(rows) >= detector.limit]
    assert len(found) > 20
    return found.iloc[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]


def terms_of(detector: Detector, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms, what may be named, and the rows as the model sees them."""
    explainer = reasons._explainer(detector)
    values, X = explainer._read(rows)
    leaves = None if explainer.tree is None else explainer.tree.leaves(X)
    return *explainer.evidence(detector.model, values, X, leaves), X


every = pytest.mark.parametrize(
    ("view", "family"),
    [
        (view, family)
        for view in ("behaviour", "paper")
        for family in FAMILIES
        if (view, family) != ("paper", "effects")
    ],
)
both = pytest.mark.parametrize("view", ["behaviour", "paper"])


@both
def test_terms_of_a_linear_model_and_the_score_of_the_ordinary_row_are_the_score(
    small: Small, trained: dict[tuple[str, str], Detector], view: str
) -> None:
    detector = trained[view, "logistic_regression"]
    terms, _, X = terms_of(detector, flagged(small, detector, 500))
    base = detector.model.score(reasons._explainer(detector).ordinary[None, :])
    assert base + terms.sum(axis=1) == pytest.approx(detector.model.score(X), rel=1e-9, abs=1e-9)


@both
def test_terms_of_a_tree_and_the_score_of_its_root_are_the_score(
    small: Small, trained: dict[tuple[str, str], Detector], view: str
) -> None:
    detector = trained[view, "decision_tree"]
    terms, _, X = terms_of(detector, flagged(small, detector, 500))
    root = node_scores(detector.model.estimator)[0]
    assert root + terms.sum(axis=1) == pytest.approx(detector.model.score(X), rel=1e-9, abs=1e-9)


@both
def test_what_a_tree_asks_for_leads_to_the_leaf_of_the_row_and_to_no_other(
    small: Small, trained: dict[tuple[str, str], Detector], view: str
) -> None:
    detector = trained[view, "decision_tree"]
    paths = reasons._explainer(detector).tree
    assert paths is not None
    X = detector.transform.apply(flagged(small, detector, 200))
    x = X.astype(np.float32)[:, None, :]
    within = ((x > paths.over) & (x <= paths.up_to)).all(axis=2)
    ends = detector.model.estimator.tree_.children_left == -1
    assert (within[:, ends].sum(axis=1) == 1).all()
    assert within[np.arange(len(X)), paths.leaves(X)].all()


def test_the_greatest_term_of_effects_is_the_score_and_all_at_their_minimum_may_be_named(
    small: Small, trained: dict[tuple[str, str], Detector]
) -> None:
    detector = trained["behaviour", "effects"]
    rows = flagged(small, detector, 500)
    terms, counted, X = terms_of(detector, rows)
    assert (terms.max(axis=1) == detector.model.score(X)).all()
    limits = [f.minimum_effect for f in behaviour.FEATURES]
    stated = [i for i, limit in enumerate(limits) if limit is not None]
    expected = rows.to_numpy()[:, stated] >= np.array([limits[i] for i in stated])
    assert (counted[:, stated] == expected).all()
    assert counted.sum() == expected.sum() > 0


def test_a_feature_exactly_at_its_minimum_effect_is_all_the_reason_there_is(
    trained: dict[tuple[str, str], Detector],
) -> None:
    row = np.zeros((1, len(NAMES)), np.float32)
    row[0, NAMES.index("edge_fail_burst")] = 17
    ((only,),) = explain(trained["behaviour", "effects"], row)
    assert (only["feature"], only["share"]) == ("edge_fail_burst", 1)


@both
@pytest.mark.parametrize("combine", ["sum", "top3", "max"])
def test_combined_surprises_are_the_score_of_tails(
    small: Small, trained: dict[tuple[str, str], Detector], view: str, combine: str
) -> None:
    detector = trained[view, "tails"]
    detector = replace(detector, model=replace(detector.model, params={"combine": combine}))
    rows = small.views[view].rows[detector.manifest.names]
    for part in (rows.head(3), rows.iloc[::7]):
        terms, _, X = terms_of(detector, part)
        columns = sorted({tail.feature for tail in detector.model.estimator.tails})
        ordered = np.sort(terms[:, columns], axis=1)
        expected = {"sum": ordered.sum(axis=1), "top3": ordered[:, -3:].mean(axis=1), "max": ordered[:, -1]}[combine]
        assert expected == pytest.approx(detector.model.score(X), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("combine", "most"), [("sum", MOST), ("top3", MOST), ("max", 1)])
def test_only_surprises_that_entered_the_combination_are_named(
    small: Small, trained: dict[tuple[str, str], Detector], combine: str, most: int
) -> None:
    detector = trained["behaviour", "tails"]
    rows = flagged(small, detector, 300)
    found = explain(replace(detector, model=replace(detector.model, params={"combine": combine})), rows)
    assert max(map(len, found)) == most
    if combine != "sum":
        assert [sum(r["share"] for r in row) for row in found] == pytest.approx([1] * len(found), abs=0.02)


@pytest.mark.parametrize("family", SLOW)
def test_other_models_are_asked_without_a_feature_and_with_it_alone(
    small: Small, trained: dict[tuple[str, str], Detector], family: str
) -> None:
    detector = trained["behaviour", family]
    terms, _, X = terms_of(detector, flagged(small, detector, 5))
    ordinary = reasons._explainer(detector).ordinary
    score = detector.model.score
    for row, told in zip(X, terms, strict=True):
        for j in range(len(NAMES)):
            without, alone = row.copy(), ordinary.copy()
            without[j], alone[j] = ordinary[j], row[j]
            fall = score(row[None])[0] - score(without[None])[0]
            rise = score(alone[None])[0] - score(ordinary[None])[0]
            assert told[j] == pytest.approx((fall + rise) / 2 if row[j] > ordinary[j] else 0, abs=1e-12)
    assert (terms > 0).any()


@every
def test_reasons_of_a_row_do_not_depend_on_other_rows(
    small: Small, trained: dict[tuple[str, str], Detector], view: str, family: str
) -> None:
    detector = trained[view, family]
    rows = flagged(small, detector, 700 if family in FAST else 40)
    given_ = rows if view == "paper" else rows.to_numpy(np.float32)
    told = explain(detector, given_)
    assert len(told) == len(rows)
    assert explain(detector, given_[::-1]) == told[::-1]
    for i in range(0, len(rows), 50 if family in FAST else 20):
        assert explain(detector, given_[i : i + 1]) == [told[i]]
        assert explain(detector, given_[i : i + 20]) == told[i : i + 20]


@every
def test_a_stored_detector_gives_the_same_reasons(
    small: Small, trained: dict[tuple[str, str], Detector], tmp_path: Path, view: str, family: str
) -> None:
    detector = trained[view, family]
    rows = flagged(small, detector, 20)
    detector.save(tmp_path)
    assert explain(Detector.load(tmp_path), rows) == explain(detector, rows)


def test_a_table_and_its_values_are_explained_alike(small: Small, trained: dict[tuple[str, str], Detector]) -> None:
    detector = trained["behaviour", "tails"]
    rows = flagged(small, detector, 50)
    assert explain(detector, rows) == explain(detector, rows.to_numpy(np.float32))


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        (family, cause)
        for family in FAMILIES
        for cause in ("edge_fail_burst", "service_dead", "edge_bytes_burst", "client_fails_60s")
        if (family, cause) != ("effects", "client_fails_60s")  # it has no minimum effect
    ],
)
def test_the_planted_cause_is_named_first(small: Small, family: str, cause: str) -> None:
    """All features have benign noise; malicious rows differ in one feature."""
    draw = np.random.default_rng(3)
    rows = pd.DataFrame(draw.exponential(2.0, (600, len(NAMES))).astype(np.float32), columns=NAMES)
    malicious = np.arange(600) % 6 == 0
    rows.loc[malicious, cause] = draw.uniform(80, 100, malicious.sum()).astype(np.float32)
    table = rows.assign(flow=np.arange(600))
    manifest = small.views["behaviour"].manifest.model_copy(update={"statistics": statistics(rows[~malicious])})
    detector = fitted(
        FAMILIES[family],
        LAST[family],
        manifest,
        table,
        malicious,
        np.arange(600),
        table[~malicious],
        target_fpr=0.02,
        needs_effect=False,
        seed=0,
    )
    found = rows[malicious & (detector.score(rows) >= detector.limit)]
    assert len(found) > 10
    first = [told[0] for told in explain(detector, found.to_numpy())]
    assert {reason["feature"] for reason in first} == {cause}
    for reason, value in zip(first, found[cause], strict=True):
        assert reason["value"] == pytest.approx(value, abs=1e-6)
        assert reason["text"].startswith(next(f.description for f in behaviour.FEATURES if f.name == cause) + ": ")


def linear(small: Small, weights: dict[str, float], **median: float) -> Detector:
    """A linear model of these weights on log2(1 + x), without scaling; the median is 0 where not given."""
    view = small.views["behaviour"]
    stats = {name: {"q01": 0.0, "q50": median.get(name, 0.0), "q99": 3.0} for name in NAMES}
    rows = pd.DataFrame(np.eye(len(NAMES), dtype=np.float32), columns=NAMES).assign(flow=range(len(NAMES)))
    detector = fitted(
        FAMILIES["logistic_regression"],
        LAST["logistic_regression"],
        view.manifest.model_copy(update={"statistics": stats}),
        rows,
        np.arange(len(rows)) > 1,
        np.arange(len(rows)),
        rows,
        target_fpr=0.5,
        needs_effect=False,
        seed=0,
    )
    detector.model.estimator.coef_ = np.array([[weights.get(name, 0.0) for name in NAMES]])
    scale = Transform(
        features=behaviour.FEATURES, scale="log", ranks={}, low=[0.0] * len(NAMES), high=[1.0] * len(NAMES)
    )
    return replace(detector, transform=scale)


def told(detector: Detector, **values: float) -> list[Reason]:
    row = np.zeros((1, len(NAMES)), np.float32)
    for name, value in values.items():
        row[0, NAMES.index(name)] = value
    (found,) = explain(detector, row)
    return found


def test_of_equal_terms_the_one_with_an_effect_comes_first(small: Small) -> None:
    detector = linear(small, {"edge_fails_60s": 1, "edge_fail_burst": 1})
    found = told(detector, edge_fails_60s=31, edge_fail_burst=31)
    assert [(r["feature"], r["share"]) for r in found] == [("edge_fail_burst", 0.5), ("edge_fails_60s", 0.5)]
    below = told(detector, edge_fails_60s=15, edge_fail_burst=15)
    assert [r["feature"] for r in below] == ["edge_fails_60s", "edge_fail_burst"]


def test_a_model_that_names_nothing_leaves_it_to_what_has_an_effect(small: Small) -> None:
    found = told(linear(small, {"no_payload": -1.0}), edge_fails_300s=900, service_dead=5, edge_burst=200)
    assert [(r["feature"], r["share"]) for r in found] == [("edge_burst", 0), ("service_dead", 0)]


def test_without_any_effect_what_is_furthest_from_ordinary_is_named(small: Small) -> None:
    found = told(linear(small, {}, edge_fails_60s=255.0), edge_fails_60s=300, edge_fails_10s=12)
    assert [(r["feature"], r["share"]) for r in found] == [("edge_fails_10s", 0)]


def test_what_is_as_ordinary_as_can_be_is_no_reason(small: Small) -> None:
    found = told(
        linear(small, {"edge_fails_60s": 5, "edge_burst": 1}, edge_fails_60s=7), edge_fails_60s=7, edge_burst=3
    )
    assert [(r["feature"], r["share"]) for r in found] == [("edge_burst", 1)]


def test_a_reason_of_less_than_a_hundredth_is_left_out(small: Small) -> None:
    detector = linear(small, {"edge_fails_60s": 1000, "edge_burst": 1})
    assert [r["feature"] for r in told(detector, edge_fails_60s=7, edge_burst=7)] == ["edge_fails_60s"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("edge_fails_60s", 212, "failures on the edge in 60 s: 212 flows, ordinary at most 3"),
        ("edge_fails_60s", 10_225, "failures on the edge in 60 s: 10,225 flows, ordinary at most 3"),
        ("edge_fails_60s", 1, "failures on the edge in 60 s: 1 flow, ordinary at most 3"),
        ("edge_burst", 17.33, "flows on the edge in 60 s to its own past peak: 17.3 times, ordinary at most 3 times"),
        ("edge_fail_share", 0.957, "share of the edge's flows in 300 s that failed: 95.7%, ordinary at most 300%"),
        ("edge_new", 1, "the edge is not part of the baseline"),
        ("edge_bytes_burst", 3e30, "bytes of the edge in 60 s to its past peak, or to 1 MB where that was less: 3e+30"),
    ],
)
def test_a_text_has_the_value_its_unit_and_what_is_ordinary(small: Small, name: str, value: float, text: str) -> None:
    (found,) = told(linear(small, {name: 1}), **{name: value})
    assert found["text"].startswith(text.removesuffix(" times"))
    assert found["value"] == pytest.approx(value, rel=1e-6)
    assert found["unit"] == next(f.unit for f in behaviour.FEATURES if f.name == name)


def test_a_flag_that_is_not_set_says_no(small: Small) -> None:
    (found,) = told(linear(small, {"service_new": -1, "edge_burst": 0}, service_new=1))
    assert found["text"] == "the service is not part of the baseline: no"


def test_effects_and_trees_say_what_they_ask_for(small: Small, trained: dict[tuple[str, str], Detector]) -> None:
    row = {"edge_fail_burst": 42.0}
    (found,) = told(trained["behaviour", "effects"], **row)
    assert found["text"].startswith("failures on the edge in 60 s to its own past peak: 42 times, ordinary at most ")
    assert found["text"].endswith(", minimum effect 17")
    detector = trained["behaviour", "decision_tree"]
    texts = [r["text"] for row_ in explain(detector, flagged(small, detector, 50)) for r in row_ if ": " in r["text"]]
    assert any(", the tree asks for over " in text for text in texts)


def test_the_tree_asks_for_its_thresholds_in_the_unit_of_the_feature(small: Small) -> None:
    rows = pd.DataFrame(np.zeros((20, len(NAMES)), np.float32), columns=NAMES).assign(flow=range(20))
    rows["service_dead"] = np.arange(20, dtype=np.float32)
    view = small.views["behaviour"]
    stats = {name: {"q01": 0.0, "q50": 0.0, "q99": 1.5} for name in NAMES}
    detector = fitted(
        FAMILIES["decision_tree"], LAST["decision_tree"], view.manifest.model_copy(update={"statistics": stats}),
        rows, np.arange(20) >= 12, np.arange(20), rows.head(12), target_fpr=0.1, needs_effect=False, seed=0,
    )  # fmt: skip
    (found,) = told(detector, service_dead=19)
    middle = np.sqrt(12.0 * 13.0) - 1
    assert found["text"] == (
        "failures at a service that is new and never answered: 19 flows, ordinary at most 2, "
        f"the tree asks for over {middle:.3g}"
    )


IDENTITIES = [f.name for f in paper.FEATURES if f.identity]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "effects"])
def test_no_identity_is_told(small: Small, trained: dict[tuple[str, str], Detector], family: str) -> None:
    detector = trained["paper", family]
    rows = flagged(small, detector, 60)
    seen = 0
    for (_, row), found in zip(rows.iterrows(), explain(detector, rows), strict=True):
        for reason in found:
            if reason["feature"] in IDENTITIES:
                seen += 1
                assert reason["value"] is None
                assert reason["text"] == f"{reason['feature']}: an identity, its value is not shown"
            else:
                assert reason["value"] is not None
        texts = " ".join(reason["text"] for reason in found)
        assert str(row["flow_id"]) not in texts
        for name in ("src_ip", "dst_ip", "time"):
            assert f"{row[name]:.0f}" not in texts.replace(",", "")
    assert seen > 0, "the case is none if no identity is a reason"
    as_arrays = reasons.tell(detector, rows)
    assert as_arrays.hidden.sum() == seen
    assert not as_arrays.value[as_arrays.hidden].any(), "what is masked would still be in the memory of an answer"


def test_a_text_from_outside_is_not_repeated(small: Small, trained: dict[tuple[str, str], Detector]) -> None:
    detector = trained["paper", "logistic_regression"]
    detector = replace(detector, model=replace(detector.model))
    rows = flagged(small, detector, 1).assign(transport="<script>")
    words = reasons._explainer(detector).words[detector.manifest.names.index("transport")]
    assert "<script>" not in json.dumps(explain(detector, rows))
    assert words[0.0].endswith(": " + detector.transform.ranks["transport"][0])
    assert words[-1.0] == words[99.0] == "transport protocol, ranked as text: a text that training did not see"


def test_durations_are_told_in_seconds(trained: dict[tuple[str, str], Detector]) -> None:
    words = reasons._explainer(trained["paper", "tails"]).words[paper_index("duration")]
    assert words[1.5e9].startswith("duration of the flow: 1.5 s, ordinary ")


def paper_index(name: str) -> int:
    return [f.name for f in paper.FEATURES].index(name)


values = st.one_of(
    st.just(0.0),
    st.just(1.0),
    st.integers(0, 20_000).map(float),
    st.floats(0, 2.0**40, width=32, allow_subnormal=False),
)


@pytest.mark.parametrize("family", list(FAMILIES))
@given(rows=st.lists(st.lists(values, min_size=len(NAMES), max_size=len(NAMES)), min_size=1, max_size=20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_has_reasons(trained: dict[tuple[str, str], Detector], family: str, rows: list[list[float]]) -> None:
    table = np.array(rows, np.float32)
    found = explain(trained["behaviour", family], table)
    assert len(found) == len(rows)
    for row, told_ in zip(table, found, strict=True):
        assert 1 <= len(told_) <= MOST
        shares = [reason["share"] for reason in told_]
        assert shares == sorted(shares, reverse=True)
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) <= 1.001
        assert len({reason["feature"] for reason in told_}) == len(told_)
        for reason in told_:
            assert reason["value"] == pytest.approx(row[NAMES.index(reason["feature"])], rel=1e-6, abs=1e-6)
            assert reason["text"]
        json.dumps(told_, allow_nan=False)


def test_nothing_to_explain_is_no_error(small: Small, trained: dict[tuple[str, str], Detector]) -> None:
    assert explain(trained["behaviour", "tails"], np.empty((0, len(NAMES)), np.float32)) == []
    assert explain(trained["paper", "tails"], small.views["paper"].rows.head(0)) == []


def test_another_manifest_is_not_explained_by_the_first(small: Small) -> None:
    detector = linear(small, {"edge_fails_60s": 1})
    (before,) = told(detector, edge_fails_60s=9)
    stats = detector.manifest.statistics | {"edge_fails_60s": {"q01": 0.0, "q50": 0.0, "q99": 8.0}}
    other = replace(detector, manifest=detector.manifest.model_copy(update={"statistics": stats}))
    (after,) = told(other, edge_fails_60s=9)
    assert (before["text"][-1], after["text"][-1]) == ("3", "8")


def test_what_was_prepared_goes_with_the_model(small: Small) -> None:
    detector = linear(small, {"edge_fails_60s": 1})
    told(detector, edge_fails_60s=9)
    known = len(reasons._EXPLAINERS)
    del detector
    gc.collect()
    assert len(reasons._EXPLAINERS) < known


def test_without_statistics_a_text_says_nothing_of_what_is_ordinary(small: Small) -> None:
    detector = linear(small, {"edge_fails_60s": 1})
    bare = replace(detector, manifest=detector.manifest.model_copy(update={"statistics": {}}))
    (found,) = told(bare, edge_fails_60s=9)
    assert found["text"] == "failures on the edge in 60 s: 9 flows"


def test_every_feature_says_what_it_stands_for() -> None:
    for feature in behaviour.FEATURES:
        assert feature.anomaly not in ("unusual value", "learned pattern"), feature.name
        if feature.name.endswith("0s"):
            assert feature.window == feature.name.rsplit("_", 1)[1]
        if feature.name.endswith("burst"):
            assert feature.window == "history"
    assert {(f.anomaly, f.window) for f in paper.FEATURES} == {("learned pattern", "training")}


def test_words_of_more_values_than_are_kept_are_the_same(
    small: Small, trained: dict[tuple[str, str], Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = trained["behaviour", "logistic_regression"]
    rows = flagged(small, detector, 500)
    expected = explain(detector, rows)
    monkeypatch.setattr(reasons, "_WORDED", 2)
    monkeypatch.setattr(reasons, "_EXPLAINERS", WeakKeyDictionary())
    assert explain(detector, rows) == explain(detector, rows) == expected
    assert max(map(len, reasons._explainer(detector).words)) == 2


def test_a_negative_zero_is_told_as_zero(small: Small) -> None:
    detector = linear(small, {"edge_burst": -1.0}, edge_burst=1.0)
    row = np.zeros((1, len(NAMES)), np.float32)
    negative = row.copy()
    negative[0, NAMES.index("edge_burst")] = -0.0
    assert json.dumps(explain(detector, negative)) == json.dumps(explain(detector, row))
