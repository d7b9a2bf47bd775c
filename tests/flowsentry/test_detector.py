from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowsentry import detector as detectors
from flowsentry.detector import CEILING, Detector, Tail, Watch
from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features import behaviour, paper
from flowsentry.features.views import FeatureSet
from flowsentry.flows.columns import Columns
from flowsentry.flows.reports import identify
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.candidates import score_fold
from flowsentry.learning.families import FAMILIES
from tests.flowsentry.tables import make_reports

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

MINUTE = 60
finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=400), st.lists(finite, min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_higher_score_is_never_less_surprising(calibration: list[float], scores: list[float]) -> None:
    surprise = Tail.fit(np.array(calibration)).surprise(np.sort(scores))
    assert (np.diff(surprise) >= 0).all()
    assert ((surprise >= 0) & (surprise <= CEILING)).all()


@pytest.mark.parametrize("target", [0.05, 0.01, 0.005, 0.001])
@pytest.mark.parametrize(("flows", "tolerance"), [(2_000, 0.5), (20_000, 0.1)])
def test_the_limit_holds_the_target_rate_on_fresh_benign_flows(target: float, flows: int, tolerance: float) -> None:
    draw = np.random.default_rng(7)
    fresh = draw.exponential(size=200_000)
    rates = [np.mean(Tail.fit(draw.exponential(size=flows)).surprise(fresh) >= -math.log10(target)) for _ in range(20)]
    assert np.mean(rates) == pytest.approx(target, rel=tolerance)
    assert np.max(rates) < 3 * target


def test_a_heavier_tail_than_the_fitted_one_costs_more_alarms_but_bounded_ones() -> None:
    draw = np.random.default_rng(7)
    tail = Tail.fit(draw.lognormal(size=20_000))
    rate = np.mean(tail.surprise(draw.lognormal(size=400_000)) >= 3)
    assert 0.001 <= rate < 0.004


def test_equal_scores_are_equally_surprising_and_no_rarer_than_they_are() -> None:
    # a tree: most flows in one leaf, 4% in another
    tail = Tail.fit(np.repeat([-3.0, 1.0], [960, 40]))
    low, between, high, beyond = tail.surprise(np.array([-3.0, -1.0, 1.0, 2.0]))
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(-math.log10(41 / 1001))
    assert low <= between <= high < beyond


def test_a_score_below_every_calibration_flow_is_no_surprise() -> None:
    assert Tail.fit(np.arange(100.0)).surprise(np.array([-50.0]))[0] == 0


@pytest.mark.parametrize("flows", [1, 2, 500])
def test_constant_scores_are_ordinary_and_whatever_is_above_them_is_not(flows: int) -> None:
    same, below, above = Tail.fit(np.zeros(flows)).surprise(np.array([0.0, -1.0, 1.0]))
    assert same == below == 0
    assert above == CEILING


def test_the_knots_of_many_flows_are_few_and_do_not_change_what_they_say() -> None:
    scores = np.random.default_rng(0).normal(size=50_000)
    tail = Tail.fit(scores)
    assert len(tail.scores) == len(tail.surprises) <= detectors.KNOTS
    exact = -np.log10([np.mean(scores >= s) for s in (0.0, 1.0, 2.0)])
    assert tail.surprise(np.array([0.0, 1.0, 2.0])) == pytest.approx(exact, abs=0.02)


def test_an_effect_is_any_feature_at_its_minimum() -> None:
    limits = {f.name: f.minimum_effect for f in behaviour.FEATURES if f.minimum_effect is not None}
    rows = pd.DataFrame(0.0, index=range(len(limits) + 2), columns=[f.name for f in behaviour.FEATURES])
    for row, (name, limit) in enumerate(limits.items()):
        rows.loc[row, name] = limit
    rows.loc[len(limits), list(limits)] = [limit - 0.01 for limit in limits.values()]
    rows.loc[len(limits) + 1, [n for n in rows if n not in limits]] = 1e6
    assert detectors.effect(rows, behaviour.FEATURES).tolist() == [True] * len(limits) + [False, False]


def test_a_view_without_minimum_effects_gates_nothing(small: Small) -> None:
    view = small.views["paper"]
    assert detectors.effect(view.rows, view.manifest.features).all()


def trained(small: Small, view: str = "behaviour", family: str = "decision_tree", **changed: object) -> Detector:
    """Fitted on the random split as in a fold, without its search."""
    features = small.views[view]
    part = (small.splits if view == "behaviour" else small.paper_splits).parts["random"]
    malicious = is_malicious(small.flows["label"])
    of_row = features.rows["flow"].to_numpy()
    fit = part.eq("fit").to_numpy()[of_row]
    calibration = (part.eq("calibration").to_numpy() & ~malicious)[of_row]
    params = {name: values[0] for name, values in FAMILIES[family].grid.items()}
    given_ = {
        "family": FAMILIES[family],
        "params": params,
        "manifest": features.manifest,
        "fit_rows": features.rows[fit],
        "malicious": malicious[of_row][fit],
        "exchange": small.flows["exchange"].to_numpy()[of_row][fit],
        "calibration_rows": features.rows[calibration],
        "target_fpr": 0.001,
        "needs_effect": True,
        "seed": 0,
    }
    return detectors.fit(**(given_ | changed))  # type: ignore[arg-type]


def test_without_a_minimum_effect_a_flow_is_no_surprise_whatever_the_model_says(small: Small) -> None:
    rows = small.views["behaviour"].rows
    gated = trained(small)
    free = replace(gated, needs_effect=False)
    effect = detectors.effect(rows, gated.manifest.features)
    assert 0 < effect.sum() < len(rows)
    assert (gated.score(rows)[~effect] == 0).all()
    assert (free.score(rows)[~effect] > 0).any()
    assert (gated.score(rows)[effect] == free.score(rows)[effect]).all()
    assert (gated.judge(rows)[1] == free.judge(rows)[1]).all()


def test_nothing_to_score_is_no_error(small: Small) -> None:
    none = small.views["behaviour"].rows.head(0)
    assert trained(small).score(none).shape == (0,)


@pytest.mark.parametrize("what", ["fit_rows", "calibration_rows"])
def test_a_fit_without_rows_says_what_to_do(small: Small, what: str) -> None:
    with pytest.raises(ProtocolError, match="give a longer recording"):
        trained(small, **{what: small.views["behaviour"].rows.head(0)})


@pytest.mark.parametrize("value", [False, True])
def test_a_fit_on_one_class_says_so(small: Small, value: bool) -> None:
    rows = small.views["behaviour"].rows.head(100)
    with pytest.raises(ProtocolError):
        trained(small, fit_rows=rows, malicious=np.full(100, value), exchange=np.arange(100))


@pytest.mark.parametrize(
    ("view", "family"),
    [("behaviour", name) for name in sorted(FAMILIES)]
    + [("paper", name) for name in sorted(set(FAMILIES) - {"effects"})],
)
def test_a_stored_detector_gives_the_same_verdicts_bit_by_bit(
    small: Small, tmp_path: Path, view: str, family: str
) -> None:
    detector = trained(small, view, family).with_card({"decision": "é", "value": 0.1})
    detector.save(tmp_path / "it")
    loaded = Detector.load(tmp_path / "it")
    rows = small.views[view].rows
    assert loaded.score(rows).tobytes() == detector.score(rows).tobytes()
    assert (loaded.judge(rows)[1] == detector.judge(rows)[1]).all()
    assert replace(loaded, model=detector.model) == detector


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes())


@pytest.mark.parametrize("damage", [_remove, _cut, _not_utf8])
@pytest.mark.parametrize(
    "file",
    ["view.json", "transform.json", "tail.json", "limit.json", "card.json", "model/model.json", "model/model.skops"],
)
def test_a_damaged_detector_is_refused(small: Small, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    trained(small).save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(StoreError) as caught:
        Detector.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("view.json", "version", "0"),
        ("view.json", "name", "other"),
        ("view.json", "extra", 1),
        ("transform.json", "low", [0.0]),
        ("transform.json", "high", ["x"]),
        ("tail.json", "surprises", [0.0]),
        ("tail.json", "scores", []),
        ("tail.json", "excess", -1.0),
        ("limit.json", "target_fpr", "much"),
        ("limit.json", "target_fpr", 0),
        ("limit.json", "target_fpr", 2),
        ("limit.json", "needs_effect", "false"),
    ],
)
def test_a_detector_with_impossible_parts_is_refused(
    small: Small, tmp_path: Path, file: str, key: str, value: object
) -> None:
    trained(small).save(tmp_path)
    content = json.loads((tmp_path / file).read_text()) | {key: value}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(StoreError):
        Detector.load(tmp_path)


@pytest.mark.parametrize(
    ("scores", "surprises"), [([1.0, 0.0], [0.0, 1.0]), ([0.0, 1.0], [1.0, 0.0]), ([0.0, math.nan], [0.0, 1.0])]
)
def test_a_calibration_that_is_not_in_order_is_refused(
    small: Small, tmp_path: Path, scores: list[float], surprises: list[float]
) -> None:
    trained(small).save(tmp_path)
    (tmp_path / "tail.json").write_text(json.dumps({"scores": scores, "surprises": surprises, "excess": 1.0}))
    with pytest.raises(StoreError):
        Detector.load(tmp_path)


def test_parts_of_detectors_of_different_views_are_refused(small: Small, tmp_path: Path) -> None:
    trained(small).save(tmp_path / "one")
    trained(small, "paper").save(tmp_path / "other")
    for file in ("view.json", "transform.json"):
        changed = tmp_path / file
        (tmp_path / "one" / file).rename(changed)
        (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
        with pytest.raises(StoreError, match="do not belong together"):
            Detector.load(tmp_path / "one")
        changed.replace(tmp_path / "one" / file)


def test_a_folder_without_a_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a stored detector"):
        Detector.load(tmp_path / "absent")


def test_a_detector_of_another_version_of_the_view_is_to_be_trained_again(small: Small, tmp_path: Path) -> None:
    detector = trained(small)
    replace(detector, manifest=detector.manifest.model_copy(update={"version": "0"})).save(tmp_path)
    with pytest.raises(StoreError, match="train it again"):
        Detector.load(tmp_path)


@pytest.mark.parametrize("view", ["behaviour", "paper"])
@pytest.mark.parametrize("family", ["decision_tree", "logistic_regression", "knn", "tails"])
def test_verdicts_on_raw_reports_are_the_scores_of_the_evaluation(small: Small, view: str, family: str) -> None:
    detector = trained(small, view, family)
    splits = small.splits if view == "behaviour" else small.paper_splits
    (fold,) = splits.of("random")
    evaluated = score_fold(detector, small.views[view], splits, fold).set_index("flow")
    final = detector.verdicts(small.raw).groupby("flow").last().loc[evaluated.index]
    assert (final["anomaly_score"] == evaluated["score"]).all()
    assert (is_malicious(final["label"]) == evaluated["flagged"]).all()
    assert (final["threshold"] == 3).all()


def test_a_recording_gets_the_same_verdicts_alone_and_beside_another(small: Small) -> None:
    detector = trained(small)
    other = small.raw.assign(recording=pd.Categorical(["other"] * len(small.raw)))
    alone = detector.verdicts(small.raw)
    both = detector.verdicts(pd.concat([small.raw, other], ignore_index=True).astype({"recording": "category"}))
    told = ["anomaly_score", "label", "warm"]
    assert both[told].head(len(alone)).equals(alone[told])
    assert both[told].tail(len(alone)).reset_index(drop=True).equals(alone[told])
    assert both["flow"].nunique() == 2 * alone["flow"].nunique()


def test_later_reports_do_not_change_earlier_verdicts(small: Small) -> None:
    detector = trained(small)
    whole = detector.verdicts(small.raw)
    half = detector.verdicts(small.raw.head(len(small.raw) // 2))
    assert half.equals(whole.head(len(half)))


def test_a_flow_stays_as_bad_as_it_once_was(small: Small) -> None:
    """A dead service is called often, then one of the flows turns out to carry data."""
    calm = [{"at": 10 * n, "flow_id": f"calm-{n}"} for n in range(181)]
    storm = [
        {"at": 1900 + n / 10, "flow_id": f"storm-{n}", "dst_ip": "10.9.9.9", "dst_port": 4444, "bytes": 60,
         "src_port": 40001 + n}
        for n in range(60)
    ]  # fmt: skip
    later = [{**storm[-1], "at": 2050 + 10 * n, "bytes": 5000 * (n + 1)} for n in range(3)]
    reports = make_reports(calm + storm + later)
    detector = trained(small, family="tails")
    verdicts = detector.verdicts(reports)
    last = verdicts[verdicts["flow"] == verdicts["flow"].iloc[-1]]
    assert len(last) == 4
    own = detector.score(behaviour.compute(reports)[0].loc[last.index])
    assert own[-1] < detector.limit < own[0], "the case is none if the last report looks as bad as the first"
    assert last["anomaly_score"].tolist() == np.maximum.accumulate(own).tolist()


def test_paper_judges_every_report_by_itself(small: Small) -> None:
    detector = trained(small, "paper")
    verdicts = detector.verdicts(small.raw)
    assert verdicts["flow"].tolist() == identify(small.raw).tolist()
    assert verdicts["anomaly_score"].tolist() == detector.score(paper.compute(small.raw)).tolist()
    assert (verdicts["first_alarm"].notna() == is_malicious(verdicts["label"])).all()


def test_the_digest_is_of_what_decides_a_verdict(small: Small, tmp_path: Path) -> None:
    detector = trained(small)
    detector.save(tmp_path)
    assert Detector.load(tmp_path).digest == detector.with_card({"a": 1}).digest == detector.digest
    assert replace(detector, target_fpr=0.002).digest != detector.digest
    assert trained(small, seed=1, family="logistic_regression").digest != detector.digest


@given(st.lists(st.integers(0, 400), max_size=6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_watch_gives_the_offline_verdicts_however_reports_are_cut(
    small: Small, cuts: list[int], restart: bool
) -> None:
    detector = trained(small, family="tails")
    reports = small.raw.iloc[-400:].reset_index(drop=True)
    watch, parts = detector.watch(), []
    for begin, end in itertools.pairwise(sorted({0, *cuts, len(reports)})):
        parts.append(watch.take(Columns.of(reports.iloc[begin:end])).table())
        if restart:
            watch = Watch.load(detector, watch.snapshot().to_bytes())
    told = pd.concat(parts, ignore_index=True)
    assert told.equals(detector.verdicts(reports)[told.columns])


def test_a_stream_is_warm_after_its_warm_up(small: Small) -> None:
    verdicts = trained(small).verdicts(small.raw)
    since = small.raw["time"] - small.raw["time"].min()
    assert (verdicts["warm"] == (since >= pd.Timedelta(minutes=30))).all()
    assert 0 < verdicts["warm"].sum() < len(verdicts)
    assert trained(small, "paper").verdicts(small.raw)["warm"].all()


def test_the_card_travels_with_a_detector_that_stays_the_same(small: Small) -> None:
    detector = trained(small)
    carded = detector.with_card({"a": 1})
    assert (carded.card, detector.card) == ({"a": 1}, {})
    assert carded.model is detector.model


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_worst_of_a_flow_is_its_highest_value(count: int) -> None:
    draw = np.random.default_rng(count)
    flows, values = draw.integers(0, 3, count), draw.normal(size=count)
    numbers, highest = detectors.worst(values, flows)
    expected = pd.Series(values).groupby(flows).max()
    assert numbers.tolist() == expected.index.tolist()
    assert highest.tolist() == expected.tolist()


def test_a_view_with_other_columns_is_not_scored(small: Small) -> None:
    rows: FeatureSet = small.views["paper"]
    with pytest.raises(KeyError):
        trained(small).score(rows.rows)


def test_judging_scores_as_scoring_does(small: Small) -> None:
    rows = small.views["behaviour"].rows
    detector = trained(small)
    scores, own = detector.judge(rows)
    assert scores.tobytes() == detector.score(rows).tobytes()
    assert own.tolist() == detector.model.predict(detector.transform.apply(rows)).tolist()
