"""Why a verdict is what it is: the features that made it, in words with values (docs/decisions/0010-reasons.md).

Every model gives each feature of a flagged row a *term*, positive where the feature speaks for malice. Terms are exact
for the models that allow it:

- logistic regression: weight times distance from the ordinary row; the terms and the ordinary row's score add up to
  the row's score;
- decision tree: what each decision on the row's path adds to the score of the node before it (Saabas 2014), summed by
  feature; the terms and the root's score add up to the leaf's;
- effects: the excess over the feature's minimum effect; the greatest is the score;
- tails: the feature's surprise, where it entered the combination.

Boosting, support vectors and neighbours have no such terms. For them a term is the mean of how far the score falls when
the feature alone is made ordinary, and how far the ordinary row's score rises when it alone gets the feature's value:
the last and the first step of the Shapley value. The fall alone overlooks features that say the same twice.

*Ordinary* is the median of the manifest's statistics; a category's is the middle of its scale.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, TypedDict
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from flowsentry.features.views import Feature, ViewManifest
from flowsentry.flows.hashing import compiled
from flowsentry.learning.model import Model, node_scores
from flowsentry.learning.tails import SignedTails

if TYPE_CHECKING:
    from flowsentry.detector import Detector

MOST: Final = 3
"""Reasons of a verdict."""
NEGLIGIBLE: Final = 0.01
"""Share of the evidence below which a further reason is not worth a line."""
_ROWS: Final = 500
"""Rows that are explained at a time: their arrays stay in the cache."""
_FEW: Final = 16
"""Rows up to which plain bisection is faster than numpy's."""
AT_HAND: Final = 64
"""Rows whose answers exist as objects at a time: of many more, Python's collector would look through all, again and
again."""
_WORDED: Final = 2048
"""Values of one feature whose words are kept; values come again, above all in a flood."""

_SHOWN: Final = {"share": (100.0, "%"), "ns": (1e-9, " s"), "ratio": (1.0, " times")}
"""Units that read better as others: factor and ending."""


class Reason(TypedDict):
    """One feature that made a verdict."""

    feature: str
    value: float | None
    """In the feature's unit; the rank of a category; None for an identity, which is never told."""
    unit: str
    share: float
    """Of all that speaks for malice, 0..1. It is 0 where the model's terms name nothing: then the features at their
    minimum effect, or the one furthest from ordinary, are told."""
    text: str


@dataclass(frozen=True, eq=False)
class Told:
    """The reasons of some rows one after the other; those of row i are from `ends[i]` up to `ends[i + 1]`, best first.

    What `Reason` says of its members holds here too.
    """

    features: tuple[Feature, ...]
    """The view's."""
    ends: np.ndarray
    """int64 [rows + 1]; every row has a reason."""
    feature: np.ndarray
    """int64 [reasons]: place among `features`."""
    value: np.ndarray
    """float64 [reasons]; 0 for an identity."""
    hidden: np.ndarray
    """bool [reasons]: the value is an identity."""
    share: np.ndarray
    """float64 [reasons]."""
    text: list[str]
    """[reasons]."""

    def leading(self) -> np.ndarray:
        """int64 [rows]: the feature of each row's best reason."""
        return np.asarray(self.feature[self.ends[:-1]])

    def reasons(self) -> Iterator[list[Reason]]:
        """As objects, for each row; only those of a few rows are made before they are asked for."""
        names, units = [f.name for f in self.features], [f.unit for f in self.features]
        for first in range(0, len(self.ends) - 1, AT_HAND):
            ends = self.ends[first : first + AT_HAND + 1].tolist()
            part, start = slice(ends[0], ends[-1]), ends[0]
            values: list[float | None] = self.value[part].tolist()
            for place in np.flatnonzero(self.hidden[part]).tolist():
                values[place] = None
            columns = zip(self.feature[part].tolist(), values, self.share[part].tolist(), self.text[part], strict=True)
            flat: list[Reason] = [
                {"feature": names[j], "value": value, "unit": units[j], "share": share, "text": text}
                for j, value, share, text in columns
            ]
            yield from [flat[begin - start : end - start] for begin, end in pairwise(ends)]


def explain(detector: Detector, rows: np.ndarray | pd.DataFrame) -> list[list[Reason]]:
    """Reasons of flagged rows.

    Args:
        detector: what flagged them.
        rows: the view's columns; for a view without categories also [rows, features] in the manifest's order.

    Returns:
        For each row one to `MOST` reasons, best first. Where terms are equal, a feature at its minimum effect comes
        before others. The reasons of a row do not depend on the rows that are explained with it.
    """
    return list(tell(detector, rows).reasons())


def tell(detector: Detector, rows: np.ndarray | pd.DataFrame) -> Told:
    """`explain` as arrays."""
    return _explainer(detector).tell(detector.model, rows)


_EXPLAINERS: WeakKeyDictionary[Model, _Explainer] = WeakKeyDictionary()


def _explainer(detector: Detector) -> _Explainer:
    known = _EXPLAINERS.get(detector.model)
    if known is None or known.manifest is not detector.manifest or known.transform is not detector.transform:
        known = _EXPLAINERS[detector.model] = _Explainer(detector)
    return known


class _Explainer:
    """What is prepared once for a detector. It does not hold the model, so that it goes when the model does."""

    def __init__(self, detector: Detector) -> None:
        manifest, transform, model = detector.manifest, detector.transform, detector.model
        self.manifest, self.transform = manifest, transform
        self.features = manifest.features
        self.harm = np.array([feature.harm for feature in self.features], np.float64)
        self.at_effect, self.unit = transform.minimum_effects()
        stated = [np.inf if f.minimum_effect is None else f.minimum_effect for f in self.features]
        self.minimum = np.array(stated, np.float32)
        # Distances are comparable on the scale of the view: log2 units, or shares of the fitted range.
        self.distance = self.unit if transform.scale == "log" else np.ones(len(self.features))
        self.ordinary = _ordinary(detector)
        self.kept = len(self.features)
        self.tree: _Paths | None = None
        estimator = model.estimator
        if model.family == "logistic_regression":
            self.weights = np.asarray(estimator.coef_[0], np.float64)
        elif model.family == "decision_tree":
            self.tree = _Paths(estimator, len(self.features))
        elif model.family == "tails":
            self.tails = _Tails(estimator)
            self.kept = {"max": 1, "top3": 3}.get(str(model.params["combine"]), self.kept)
        self.words = [
            _Words(_sentence(feature, manifest, model, transform.ranks.get(feature.name))) for feature in self.features
        ]
        self.identity = np.array([feature.identity for feature in self.features], bool)
        self.limits: dict[tuple[int, int], str] = {}

    def tell(self, model: Model, rows: np.ndarray | pd.DataFrame) -> Told:
        count, most = len(rows), len(rows) * MOST
        features, told, shares = np.empty(most, np.int64), np.empty(most), np.empty(most)
        ends = np.zeros(count + 1, np.int64)
        leaf = None if self.tree is None else np.empty(count, np.int64)
        for begin in range(0, count, _ROWS):
            part = slice(begin, begin + _ROWS)
            values, X = self._read(rows.iloc[part] if isinstance(rows, pd.DataFrame) else rows[part])
            leaves = None
            if self.tree is not None and leaf is not None:
                leaves = leaf[part] = self.tree.leaves(X)
            terms, counted = self.evidence(model, values, X, leaves)
            found = np.asarray(counted.any(axis=1))
            if not found.all():
                terms, counted = self._stand_in(values, X, terms, counted, ~found)
            arrays = (values, X, terms, counted, found, self.minimum, self.at_effect, self.unit)
            _choose(*arrays, self.kept, begin, features, told, shares, ends)
        feature, share = features[: ends[-1]], shares[: ends[-1]].round(4)
        # float32 has no more digits; the others are only noise. Adding 0 makes a negative zero an ordinary one.
        value = told[: ends[-1]].round(6) + 0.0
        words, places = self.words, feature.tolist()
        text = [words[j][number] for j, number in zip(places, value.tolist(), strict=True)]
        if leaf is not None:
            at = zip(text, np.repeat(leaf, np.diff(ends)).tolist(), places, strict=True)
            text = [what + self._limit(end, j) for what, end, j in at]
        hidden = self.identity[feature]
        value[hidden] = 0.0
        return Told(self.features, ends, feature, value, hidden, share, text)

    def evidence(
        self, model: Model, values: np.ndarray, X: np.ndarray, leaves: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Terms, float64 [rows, features], and which of them may be named, bool of the same shape."""
        match model.family:
            case "logistic_regression":
                terms = (X - self.ordinary) * self.weights
            case "decision_tree" if self.tree is not None and leaves is not None:
                terms = self.tree.terms[leaves]
            case "effects":
                terms = np.where(np.isnan(self.at_effect), -np.inf, (X - self.at_effect) * self.unit)
                return terms, values >= self.minimum
            case "tails":
                terms = self.tails.surprises(X)
            case _:
                terms = self._changes(model, X)
        return terms, terms > 0

    def _read(self, rows: np.ndarray | pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """The view's numbers as they are, a category's rank among them, and as the model sees them."""
        if isinstance(rows, np.ndarray):
            return rows.astype(np.float64, order="C"), self.transform.apply_values(rows)
        X = self.transform.apply(rows)
        values = np.empty(X.shape)
        for j, feature in enumerate(self.features):
            if feature.kind == "category":
                values[:, j] = np.round(X[:, j] * self.unit[j] + self.transform.low[j])
            else:
                values[:, j] = rows[feature.name].to_numpy(np.float64)
        return values, X

    def _away(self, X: np.ndarray) -> np.ndarray:
        """How far each value is from the ordinary one, in the direction of harm where there is one."""
        apart = (X - self.ordinary) * self.distance
        return np.asarray(np.where(self.harm == 0, np.abs(apart), apart * self.harm))

    def _changes(self, model: Model, X: np.ndarray) -> np.ndarray:
        i, j = np.nonzero(self._away(X) > 0)
        each = np.arange(len(i))
        without, alone = X[i], np.tile(self.ordinary, (len(i), 1))
        without[each, j] = self.ordinary[j]
        alone[each, j] = X[i, j]
        scores = model.score(np.concatenate([X, without, alone, self.ordinary[None, :]]))
        whole, fallen, risen = np.split(scores[:-1], [len(X), len(X) + len(i)])
        terms = np.zeros(X.shape)
        terms[i, j] = (whole[i] - fallen + risen - scores[-1]) / 2
        return terms

    def _stand_in(
        self, values: np.ndarray, X: np.ndarray, terms: np.ndarray, counted: np.ndarray, lost: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """For `lost` rows, whose terms name nothing, the features with an effect, or else the one furthest away."""
        away = self._away(X[lost])
        furthest = np.zeros(away.shape, bool)
        furthest[np.arange(len(away)), away.argmax(axis=1)] = True
        effect = values[lost] >= self.minimum
        terms, counted = terms.copy(), counted.copy()
        terms[lost] = np.where(effect, (X[lost] - self.at_effect) * self.unit, away)
        counted[lost] = np.where(effect.any(axis=1, keepdims=True), effect, furthest)
        return terms, counted

    def _limit(self, leaf: int, j: int) -> str:
        """What the decisions on the way to a leaf ask of a feature."""
        known = self.limits.get((leaf, j))
        if known is None:
            known = self.limits[leaf, j] = self._worded_limit(leaf, j)
        return known

    def _worded_limit(self, leaf: int, j: int) -> str:
        feature = self.features[j]
        if self.tree is None or feature.identity or feature.kind != "number":
            return ""
        factor, ending = _SHOWN.get(feature.unit, (1.0, ""))
        asked = []
        for bound, word in ((self.tree.over[leaf, j], "over"), (self.tree.up_to[leaf, j], "up to")):
            if np.isfinite(bound):
                number = bound * self.unit[j] + self.transform.low[j]
                number = 2**number - 1 if self.transform.scale == "log" else number
                asked.append(f"{word} {_number(number * factor)}{ending}")
        return f", the tree asks for {' and '.join(asked)}" if asked else ""


@compiled
def _choose(
    values: np.ndarray,
    X: np.ndarray,
    terms: np.ndarray,
    counted: np.ndarray,
    found: np.ndarray,
    minimum: np.ndarray,
    at_effect: np.ndarray,
    unit: np.ndarray,
    kept: int,
    begin: int,
    feature: np.ndarray,
    value: np.ndarray,
    share: np.ndarray,
    ends: np.ndarray,
) -> None:
    """Write the reasons of rows behind those of the `begin` rows before: feature, value, share and where they end.

    Args:
        values: float64 [rows, features], and so are X, terms and counted (bool).
        X: as the model sees the values.
        terms: what speaks for malice.
        counted: terms that may be named, at least one in every row.
        found: bool [rows]; the terms of the others are not the model's, their shares are 0.
        minimum: minimum effects, inf where there is none.
        at_effect: the same in X.
        unit: of X.
        kept: terms that have a share.
        begin: rows before.
        feature: int64, written to.
        value: float64, written to.
        share: float64, written to.
        ends: int64, written to.
    """
    rows, width = terms.shape
    order, excess = np.empty(width, np.int64), np.empty(width)
    told = ends[begin]
    for i in range(rows):
        count = 0
        for j in range(width):
            if not counted[i, j]:
                continue
            term, beyond = terms[i, j], -np.inf
            if values[i, j] >= minimum[j]:
                beyond = (X[i, j] - at_effect[j]) * unit[j]
            place = count
            while place > 0:
                before = order[place - 1]
                if terms[i, before] > term or (terms[i, before] == term and excess[place - 1] >= beyond):
                    break
                order[place], excess[place] = before, excess[place - 1]
                place -= 1
            order[place], excess[place] = j, beyond
            count += 1
        count = min(count, kept)
        total = 0.0
        for place in range(count):
            total += max(terms[i, order[place]], 0.0)
        for place in range(min(count, MOST)):
            j = order[place]
            part = max(terms[i, j], 0.0) / total if total > 0 else 1.0 / count
            if place > 0 and part < NEGLIGIBLE:
                break
            feature[told], value[told] = j, values[i, j]
            share[told] = part if found[i] else 0.0
            told += 1
        ends[begin + i + 1] = told


class _Words(dict[float, str]):
    """What values of a feature mean, in words: those of the latest values are kept."""

    def __init__(self, write: Callable[[float], str]) -> None:
        self._write = write

    def __missing__(self, value: float) -> str:
        if len(self) >= _WORDED:
            self.clear()
        text = self[value] = self._write(value)
        return text


class _Paths:
    """The way from a decision tree's root to every node, by feature."""

    def __init__(self, estimator: Any, features: int) -> None:
        tree, scores = estimator.tree_, node_scores(estimator)
        self._tree = tree
        self.terms = np.zeros((tree.node_count, features))
        self.over = np.full((tree.node_count, features), -np.inf)
        self.up_to = np.full((tree.node_count, features), np.inf)
        # Children come after their parent.
        for node in np.flatnonzero(tree.children_left != -1):
            left, right, j = tree.children_left[node], tree.children_right[node], tree.feature[node]
            for child in (left, right):
                for paths in (self.terms, self.over, self.up_to):
                    paths[child] = paths[node]
                self.terms[child, j] += scores[child] - scores[node]
            self.up_to[left, j] = min(self.up_to[left, j], tree.threshold[node])
            self.over[right, j] = max(self.over[right, j], tree.threshold[node])

    def leaves(self, X: np.ndarray) -> np.ndarray:
        """int64 [rows]: the leaf that each row comes to."""
        return np.asarray(self._tree.apply(X.astype(np.float32)))


class _Tails:
    """`SignedTails` with the surprise of every knot at hand: a row costs microseconds instead of hundreds."""

    def __init__(self, tails: SignedTails) -> None:
        sides = tails.tails
        self.features = tails.features
        self.feature = np.array([tail.feature for tail in sides])
        self.sign = np.array([tail.sign for tail in sides], np.float64)
        self.last = np.array([tail.values[-1] for tail in sides])
        self.scale = np.array([tail.scale for tail in sides])
        self.values = [tail.values for tail in sides]
        self.lists = [tail.values.tolist() for tail in sides]
        shares = [(1 + np.append(tail.counts, 0)) / (tail.rows + 1) for tail in sides]
        self.begin = np.cumsum([0, *(len(share) for share in shares[:-1])])
        self.inside = -np.log10(np.concatenate(shares))
        times = np.bincount(self.feature, minlength=tails.features)
        self.choice = np.where(times > 1, np.log10(2), 0.0)
        self.once = bool((times <= 1).all())

    def surprises(self, X: np.ndarray) -> np.ndarray:
        """float64 [rows, features], as `SignedTails.score` combines them; 0 for features without a tail."""
        x = X[:, self.feature] * self.sign
        if len(x) <= _FEW:
            place = np.array([[bisect_left(*pair) for pair in zip(self.lists, row, strict=True)] for row in x.tolist()])
        else:
            columns = zip(self.values, x.T, strict=True)
            place = np.column_stack([np.searchsorted(values, column, side="left") for values, column in columns])
        beyond = np.log1p(np.maximum(x - self.last, 0.0) / self.scale) / np.log(10)
        sides = beyond + self.inside[place + self.begin]
        surprises = np.zeros((len(X), self.features))
        if self.once:
            surprises[:, self.feature] = sides
            return surprises
        for k, j in enumerate(self.feature):
            surprises[:, j] = np.maximum(surprises[:, j], sides[:, k])
        return np.asarray(np.maximum(surprises - self.choice, 0.0))


def _ordinary(detector: Detector) -> np.ndarray:
    """The ordinary row as the model sees it, float64 [features]."""
    transform, statistics = detector.transform, detector.manifest.statistics
    low, high = np.array(transform.low), np.array(transform.high)
    unit = np.where(high > low, high - low, 1.0)
    known = [statistics.get(feature.name, {}).get("q50", np.nan) for feature in detector.manifest.features]
    median = np.array(known, np.float64)
    number = np.log2(1 + median) if transform.scale == "log" else median
    return np.asarray(np.where(np.isnan(median), 0.5, (number - low) / unit))


def _sentence(
    feature: Feature, manifest: ViewManifest, model: Model, texts: list[str] | None
) -> Callable[[float], str]:
    """A writer of what a value of a feature means, in words. Identities keep their value to themselves."""
    about = feature.description
    if feature.identity:
        withheld = f"{feature.name}: an identity, its value is not shown"
        return lambda value: withheld
    if feature.kind == "flag":
        yes, no = about, f"{about}: no"
        return lambda value: yes if value >= 0.5 else no
    if texts is not None:
        named = {float(rank): f"{about}: {text}" for rank, text in enumerate(texts)}
        strange = f"{about}: a text that training did not see"
        return lambda value: named.get(value, strange)
    factor, ending = _SHOWN.get(feature.unit, (1.0, f" {feature.unit}" if feature.unit else ""))
    whole = feature.unit not in _SHOWN and len(feature.unit) > 2
    single = ending.removesuffix("s") if whole else ending
    tail = _ordinary_range(feature, manifest.statistics.get(feature.name, {}), whole)
    if model.family == "effects" and feature.minimum_effect is not None:
        tail += f", minimum effect {_number(feature.minimum_effect * factor)}"

    def write(value: float) -> str:
        shown = value * factor
        return f"{about}: {_number(shown)}{single if shown == 1 else ending}{tail}"

    return write


def _ordinary_range(feature: Feature, statistics: dict[str, float], whole: bool) -> str:
    """What 99% (one side) or 98% (both) of the rows of the statistics have; whole: of things that are counted."""
    if "q01" not in statistics or "q99" not in statistics:
        return ""
    factor, ending = _SHOWN.get(feature.unit, (1.0, ""))
    bounds = statistics["q01"] * factor, statistics["q99"] * factor
    if whole:
        bounds = math.floor(bounds[0]), math.ceil(bounds[1])
    low, high = (_number(bound) + ("%" if ending == "%" else "") for bound in bounds)
    return {1: f", ordinary at most {high}", -1: f", ordinary at least {low}", 0: f", ordinary {low} to {high}"}[
        feature.harm
    ]


def _number(value: float) -> str:
    """Three digits of a fraction, all of a whole number below 10^15."""
    if -1e15 < value < 1e15:
        whole = round(value)
        if value == whole or value >= 100 or value <= -100:
            return f"{whole:,}"
    return f"{value:.3g}"
