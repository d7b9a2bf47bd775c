from __future__ import annotations

import pytest

from flowsentry.learning.selection import choose
from flowsentry.reporting.metrics import Counts, OwnRates, Rates
from flowsentry.reporting.results import Entry, Evaluation, FoldNote, ProtocolScores, Spread

NO_COUNTS = Counts(tp=0, fp=0, tn=0, fn=0)


def _rates(**values):
    return Rates(**(dict.fromkeys(Rates.model_fields) | values))


def _entry(name, *, value, worst=None, fpr=0.0, metric="f1", baseline=False, identity=False, missing=()):
    """Both protocols with the same figures; own accuracy and family recall are the value too."""
    worst = value if worst is None else worst
    scores = ProtocolScores(
        folds=(),
        missing=missing,
        benign=10,
        malicious=9,
        counts=NO_COUNTS,
        own_counts=NO_COUNTS,
        mean=_rates(**{metric: value, "fpr": fpr}),
        worst=_rates(**{metric: worst, "fpr": fpr}),
        own_mean=OwnRates(accuracy=value, recall=None, fpr=None),
        own_worst=OwnRates(accuracy=worst, recall=None, fpr=None),
        families={},
        family_recall=Spread(flows=9, mean=value, worst=worst, worst_fold="family/flood/0"),
        places={},
        apart={},
    )
    return Entry(
        name=name,
        title=name.title(),
        baseline=baseline,
        uses_identity=identity,
        scores={p: {"published": scores, "corrected": scores} for p in ("random", "family")},
    )


def _evaluation(*entries):
    folds = [FoldNote(fold=p, protocol=p, note="", benign=10, malicious=10) for p in ("random", "family")]
    return Evaluation(
        limit=2.0,
        data={},
        entries=entries,
        folds=tuple(folds),
        impossible={"recording": "there is one recording"},
        corrections=0,
    )


def _choose(*entries, protocol="random", metric="f1", **options):
    return choose(_evaluation(*entries), protocol=protocol, metric=metric, labels="corrected", **options)


def test_the_highest_mean_is_chosen():
    found = _choose(_entry("tree", value=0.8), _entry("boosting", value=0.9, worst=0.1, fpr=0.4))
    assert found.chosen == "boosting"
    assert [r.name for r in found.ranking] == ["boosting", "tree"]
    assert "0.9000" in found.reason


def test_ties_go_to_the_better_worst_fold_then_the_lower_fpr_then_the_simpler():
    first = _choose(_entry("tree", value=0.9, worst=0.5), _entry("knn", value=0.9, worst=0.6, fpr=0.9))
    second = _choose(_entry("tree", value=0.9, fpr=0.2), _entry("knn", value=0.9, fpr=0.1))
    third = _choose(_entry("tree", value=0.9), _entry("knn", value=0.9))
    assert (first.chosen, second.chosen, third.chosen) == ("knn", "knn", "tree")


def test_accuracy_is_the_models_own():
    entry = _entry("tree", value=0.9, metric="balanced_accuracy")
    assert entry.scores["random"]["corrected"].mean.accuracy is None
    found = _choose(entry, metric="accuracy")
    assert (found.chosen, found.ranking[0].value) == ("tree", 0.9)


@pytest.mark.parametrize("baseline", [0.9, 0.95])
def test_nothing_is_chosen_unless_every_baseline_without_identity_is_beaten(baseline):
    found = _choose(
        _entry("tree", value=0.9),
        _entry("constant", value=0.4, baseline=True),
        _entry("column", value=baseline, baseline=True),
    )
    assert found.chosen is None
    assert "does not beat the baseline Column" in found.reason


def test_a_baseline_that_uses_an_identity_need_not_be_beaten_and_is_not_ranked():
    found = _choose(
        _entry("tree", value=0.9),
        _entry("column", value=0.7, baseline=True),
        _entry("ports", value=1.0, baseline=True, identity=True),
    )
    assert found.chosen == "tree"
    assert [r.name for r in found.ranking] == ["tree", "column"]


def test_family_recall_is_ranked_among_candidates_below_the_fpr_bound():
    found = _choose(
        _entry("svc", value=0.99, fpr=0.006, metric="recall"),
        _entry("tree", value=0.7, fpr=0.005, metric="recall"),
        _entry("flag_all", value=1.0, fpr=1.0, metric="recall", baseline=True),
        protocol="family",
        metric="recall",
    )
    assert found.chosen == "tree"
    assert [(r.name, r.excluded) for r in found.ranking] == [
        ("tree", None),
        ("flag_all", "FPR 1.0000 is above 0.005"),
        ("svc", "FPR 0.0060 is above 0.005"),
    ]


def test_the_fpr_bound_is_configurable_and_can_exclude_all():
    entries = [_entry("svc", value=0.99, fpr=0.02, metric="recall")]
    assert _choose(*entries, protocol="family", metric="recall", max_fpr=0.02).chosen == "svc"
    found = _choose(*entries, protocol="family", metric="recall")
    assert found.chosen is None
    assert "Svc: FPR 0.0200 is above 0.005" in found.reason


def test_the_fpr_bound_is_for_recall_alone():
    assert _choose(_entry("svc", value=0.9, fpr=0.3)).chosen == "svc"


def test_candidates_without_all_folds_or_with_an_undefined_metric_take_no_part():
    found = _choose(
        _entry("svc", value=0.99, missing=("random",)), _entry("knn", value=None), _entry("tree", value=0.5)
    )
    assert found.chosen == "tree"
    assert {r.name: r.excluded for r in found.ranking} == {
        "tree": None,
        "svc": "no scores for random",
        "knn": "f1 is undefined on these flows",
    }


def test_an_impossible_protocol_selects_nothing_and_says_why():
    found = _choose(_entry("tree", value=0.9), protocol="recording")
    assert found.chosen is None
    assert "there is one recording" in found.reason
