"""The search for a family's best parameters: every candidate is tried, few of them on all rows.

Three ways to spend less time than a plain grid search:

- candidates that differ only in what is read from a fit share it: neighbours are queried once per metric, for
the
  most neighbours that any candidate wants; a tree that did not reach its greatest depth counts for lower ones too;
  tails are learned once;
- families whose cost grows fast race: all candidates start on a sample, the better third goes on to more
rows, the
  last few to all (successive halving: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
  Hyperparameter Optimization", AISTATS 2016), and who is clearly behind drops out at once;
- fits run in threads, on one copy of the rows: scikit-learn's compiled code lets others work meanwhile.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import KDTree
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score, roc_curve
from threadpoolctl import threadpool_limits

from flowsentry.errors import ProtocolError
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import Family, fit_rows, sample
from flowsentry.learning.model import Parameter, smoothed_log_odds

Metric = Literal["accuracy", "balanced_accuracy", "recall_at_fpr", "average_precision"]
Budget = Literal["full", "small"]
InnerFold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Row numbers to fit on and to test on."""
Progress = Callable[[int, int, str], None]
"""Called with fits done, fits planned, and what is being done."""

RUNGS: Final[dict[str, tuple[int, ...]]] = {"logistic_regression": (4000,), "svc": (2000, 8000)}
"""Training rows of the rounds before the last, which has all rows; families not named have the last round only."""
SMALL: Final = 1000
"""Training rows of the last round of the small budget; families that race begin with a quarter of them."""
KEEP: Final = 3
"""One in so many candidates goes on to the next round."""
MARGIN: Final = 0.02
"""A candidate this far behind the best drops out, unless two standard errors of the difference are more."""


@dataclass(frozen=True)
class Trial:
    """One candidate and how it did in the last round that it took part in."""

    params: dict[str, Parameter]
    score: float
    """Mean of `scores_per_fold`."""
    scores_per_fold: tuple[float, ...]
    rows: int
    """Training rows of that round: the most over the folds."""
    seconds: float
    """Time spent on it in all rounds; of what is shared, its share."""


@dataclass(frozen=True)
class SearchResult:
    """All trials, in the order of the grid, and the winner."""

    trials: tuple[Trial, ...]
    best: dict[str, Parameter]
    metric: Metric
    score: float
    """Of the best."""


def measure(
    metric: Metric,
    y: NDArray[np.bool_],
    scores: NDArray[np.float64],
    predicted: NDArray[np.bool_],
    target_fpr: float,
) -> float:
    """One figure for one test fold that holds both classes.

    `accuracy` and `balanced_accuracy` are of the model's own predictions; `average_precision` is of the order
    of the scores. `recall_at_fpr` is the height of the ROC curve over `target_fpr`, straight between its
    corners: the limit comes from the fold's own benign rows, so it is the limit-free quality of the order at
    its top; tied scores count as if they were broken at random (a constant model gets `target_fpr`), and a
    fold of few benign rows gives no jumps.
    """
    match metric:
        case "accuracy":
            return float((predicted == y).mean())
        case "balanced_accuracy":
            return float((predicted[y].mean() + (~predicted[~y]).mean()) / 2)
        case "average_precision":
            return float(average_precision_score(y, scores))
        case "recall_at_fpr":
            fpr, tpr, _ = roc_curve(y, scores)
            return float(np.interp(target_fpr, fpr, tpr))


def search(
    family: Family,
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    *,
    harm: Sequence[int] | NDArray[np.int8],
    folds: Sequence[InnerFold],
    metric: Metric,
    seed: int,
    exchange: NDArray[np.int64] | None = None,
    effects: EffectSizes | None = None,
    budget: Budget = "full",
    target_fpr: float,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Find the best candidate of a family; ties go to the first in the order of the grid.

    Args:
        family: a value of `FAMILIES`.
        X: float64 [n x d], finite.
        y: bool [n], True is malicious.
        harm: [d] direction of harm of each feature: -1, 0 or 1.
        folds: what to fit on and to test on, from `stratified_group_folds` or `held_out_folds`.
        metric: what is to be high, as a mean over the folds.
        seed: of samples and of estimators.
        exchange: int64 [n]; samples take exchanges whole. None: rows are sampled one by one.
        effects: the view's minimum effects, for the family of that name.
        budget: `small` ends with `SMALL` rows of each fold: for searches inside a protocol.
        target_fpr: for `recall_at_fpr`.
        on_progress: told of every finished fit, from threads of its own.

    Returns:
        A trial for every candidate of the grid, and the best among those of the last round.

    Raises:
        ProtocolError: a fold lacks one of the classes, or there is no fold.
    """
    _check_folds(y, folds)
    candidates = family.candidates
    cap = family.row_cap or len(y)
    early = RUNGS.get(family.name, ())
    rounds = (*(SMALL // 4 for _ in early[:1]), SMALL) if budget == "small" else (*early, cap)
    smallest = min(len(train) for train, _ in folds)
    # A round that is nearly all rows saves nothing.
    rounds = (*(rows for rows in rounds[:-1] if rows < smallest / 2), rounds[-1])
    directions = np.asarray(harm, dtype=np.int8)
    trials: dict[int, Trial] = {}
    alive = list(range(len(candidates)))
    for number, rows in enumerate(rounds):
        last = number == len(rounds) - 1
        whole = last and budget == "full"
        parts = [
            (_part(train, y, rows, seed, exchange), test if whole else _part(test, y, 2 * rows, seed, exchange))
            for train, test in folds
        ]
        shared = _share(family, [candidates[i] for i in alive])
        note = f"{family.title}: {len(alive)} candidates on {max(len(train) for train, _ in parts):,} rows"
        tick = _Ticker(len(shared) * len(parts), note, on_progress)

        def run(
            job: tuple[list[int], InnerFold], alive: list[int] = alive, tick: _Ticker = tick
        ) -> tuple[list[float], float]:
            members, (train, test) = job
            start = time.perf_counter()
            group = [candidates[alive[i]] for i in members]
            results = [
                measure(metric, y[test], scores, scores > boundary, target_fpr)
                for scores, boundary in _fit_and_score(
                    family, group, X[train], y[train], X[test], directions, seed, effects
                )
            ]
            seconds = time.perf_counter() - start
            tick()
            return results, seconds / len(members)

        jobs = [(members, part) for members in shared for part in parts]
        outcomes = _in_threads(run, jobs)
        for g, members in enumerate(shared):
            of_group = outcomes[g * len(parts) : (g + 1) * len(parts)]
            for position, member in enumerate(members):
                i = alive[member]
                per_fold = tuple(results[position] for results, _ in of_group)
                earlier = trials[i].seconds if i in trials else 0.0
                trials[i] = Trial(
                    dict(candidates[i]),
                    float(np.mean(per_fold)),
                    per_fold,
                    max(len(train) for train, _ in parts),
                    earlier + sum(seconds for _, seconds in of_group),
                )
        if not last:
            alive = _better(alive, trials)
    best = min(alive, key=lambda i: (-trials[i].score, i))
    return SearchResult(
        tuple(trials[i] for i in range(len(candidates))), dict(candidates[best]), metric, trials[best].score
    )


def stratified_group_folds(
    y: NDArray[np.bool_], exchange: NDArray[np.int64], n: int = 3, seed: int = 0
) -> list[InnerFold]:
    """Folds with about the same share of both classes; no exchange is on both sides.

    Args:
        y: bool [rows], True is malicious. An exchange with a malicious row is dealt as malicious.
        exchange: int64 [rows].
        n: how many folds.
        seed: of the order in which exchanges are dealt.
    """
    fold = _deal(y, exchange, n, seed)
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(n)]


def held_out_folds(
    y: NDArray[np.bool_], attack_group: pd.Series, exchange: NDArray[np.int64], n: int, seed: int
) -> list[InnerFold]:
    """Folds that hold groups of attacks out: fitted without them, tested on them and on benign rows left out too.

    For choosing parameters under the family protocol: a candidate is as good as it is on attacks that it
    never saw. The groups are dealt to the folds in turn, and benign exchanges in equal parts. Benign rows of an
    attack's exchange (wrong labels) are not tested, and not fitted on when that attack is held out.

    Args:
        y: bool [rows], True is malicious.
        attack_group: [rows], the group of a malicious row; missing for benign rows.
        exchange: int64 [rows].
        n: how many folds, fewer if there are fewer groups.
        seed: of the order in which benign exchanges are dealt.

    Raises:
        ProtocolError: there are not two groups of attacks: nothing would be left to fit on.
    """
    names = pd.Categorical(attack_group)
    codes = np.where(y, names.codes, -1)
    present = np.unique(codes[codes >= 0])
    if len(present) < 2:
        found = ", ".join(str(names.categories[code]) for code in present) or "none"
        raise ProtocolError(f"parameters cannot be chosen on held-out attacks: two groups are needed, found {found}")
    keys = np.unique(exchange, return_inverse=True)[1]
    group_of_exchange = np.full(int(keys.max()) + 1, -1)
    group_of_exchange[keys[codes >= 0]] = codes[codes >= 0]
    group = group_of_exchange[keys]
    n = min(n, len(present))
    part = _deal(y, exchange, n, seed)
    folds = []
    for turn in range(n):
        held_out = present[turn::n]
        tested_benign = (group == -1) & (part == turn)
        train = ~np.isin(group, held_out) & ~tested_benign & (~y | (codes >= 0))
        folds.append((np.flatnonzero(train), np.flatnonzero(np.isin(codes, held_out) | tested_benign)))
    return folds


def _deal(y: NDArray[np.bool_], exchange: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """A part 0..n-1 for each row; per class, parts have the same number of rows up to one exchange."""
    keys = np.unique(exchange, return_inverse=True)[1]
    count = int(keys.max()) + 1
    malicious = np.bincount(keys, weights=y, minlength=count) > 0
    size = np.bincount(keys, minlength=count)
    part = np.empty(count, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(count)
    for members in (order[malicious[order]], order[~malicious[order]]):
        middle = size[members].cumsum() - size[members] / 2
        part[members] = np.floor(middle * n / max(1, size[members].sum()))
    return part[keys]


def _check_folds(y: NDArray[np.bool_], folds: Sequence[InnerFold]) -> None:
    if not folds:
        raise ProtocolError("parameters cannot be chosen without a fold")
    for number, fold in enumerate(folds, 1):
        for side, rows in zip(("training", "test"), fold, strict=True):
            if not y[rows].any() or y[rows].all():
                missing = "malicious" if not y[rows].any() else "benign"
                raise ProtocolError(
                    f"parameters cannot be chosen: fold {number} has no {missing} flow among its {side} rows"
                )


def _part(
    rows: NDArray[np.int64], y: NDArray[np.bool_], most: int, seed: int, exchange: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    return rows[sample(y[rows], most, seed, None if exchange is None else exchange[rows])]


class _Ticker:
    def __init__(self, total: int, note: str, on_progress: Progress | None) -> None:
        self.done, self.total, self.note, self.on_progress = 0, total, note, on_progress

    def __call__(self) -> None:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, self.note)


def _in_threads(run: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    with warnings.catch_warnings(), threadpool_limits(1, "blas"), ThreadPoolExecutor(joblib.cpu_count()) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)
        return list(pool.map(run, jobs))


def _better(alive: list[int], trials: dict[int, Trial]) -> list[int]:
    """Those that go on: the best third, without those clearly behind the best."""
    order = sorted(alive, key=lambda i: (-trials[i].score, i))
    leader = np.array(trials[order[0]].scores_per_fold)
    kept = []
    for i in order[: -(-len(order) // KEEP)]:
        behind = leader - np.array(trials[i].scores_per_fold)
        error = behind.std(ddof=1) / np.sqrt(len(behind)) if len(behind) > 1 else 0.0
        if behind.mean() <= max(MARGIN, 2 * error):
            kept.append(i)
    return sorted(kept)


def _share(family: Family, candidates: Sequence[dict[str, Parameter]]) -> list[list[int]]:
    """Positions of candidates that share a fit."""
    free = {
        "knn": ("n_neighbors", "weights"),
        "decision_tree": ("max_depth",),
        "tails": ("combine",),
    }.get(family.name, ())
    groups: dict[tuple[Parameter, ...], list[int]] = {}
    for i, params in enumerate(candidates):
        key = tuple(value for name, value in params.items() if name not in free) if free else (i,)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _fit_and_score(
    family: Family,
    group: Sequence[dict[str, Parameter]],
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    X_test: NDArray[np.float64],
    harm: NDArray[np.int8],
    seed: int,
    effects: EffectSizes | None,
) -> list[tuple[NDArray[np.float64], float]]:
    """Scores of test rows and the boundary of predict, for each candidate of a group that shares a fit."""
    match family.name:
        case "knn":
            return [(scores, 0.0) for scores in _neighbours(group, X, y, X_test)]
        case "decision_tree":
            return [(scores, 0.0) for scores in _depths(family, group, X, y, X_test, harm, seed)]
        case _:
            models = [fit_rows(family, params, X, y, harm, seed, effects) for params in group]
            return [(model.score(X_test), model.boundary) for model in models]


def _neighbours(
    group: Sequence[dict[str, Parameter]],
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    X_test: NDArray[np.float64],
) -> list[NDArray[np.float64]]:
    """One query for the most neighbours: the nearest three are the first three of the nearest eleven.

    SciPy's tree gives the same distances as scikit-learn's, and is several times faster.
    """
    most = max(int(params["n_neighbors"]) for params in group)
    power = {"euclidean": 2, "manhattan": 1}[str(group[0]["metric"])]
    tree = KDTree(X, leafsize=30, balanced_tree=False, compact_nodes=False)
    distance, index = tree.query(X_test, k=np.arange(1, most + 1), p=power)
    malicious = y[index].astype(np.float64)
    scores = []
    for params in group:
        k = int(params["n_neighbors"])
        weight = np.ones((len(X_test), k))
        if params["weights"] == "distance":
            # As scikit-learn: where a neighbour is the row itself, only such neighbours count.
            same = distance[:, :k] == 0
            np.divide(1.0, distance[:, :k], out=weight, where=~same)
            weight = np.where(same.any(axis=1, keepdims=True), same, weight)
        share = (weight * malicious[:, :k]).sum(axis=1) / weight.sum(axis=1)
        scores.append(smoothed_log_odds(share, k))
    return scores


def _depths(
    family: Family,
    group: Sequence[dict[str, Parameter]],
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    X_test: NDArray[np.float64],
    harm: NDArray[np.int8],
    seed: int,
) -> list[NDArray[np.float64]]:
    """A tree that stopped growing by itself is also the tree of every lower limit that it kept to."""
    scores: dict[int, NDArray[np.float64]] = {}
    grown, last = np.inf, np.empty(0)
    for limit in sorted({int(params["max_depth"]) for params in group}, reverse=True):
        if limit < grown:
            model = fit_rows(family, {**group[0], "max_depth": limit}, X, y, harm, seed, None)
            grown, last = model.estimator.get_depth(), model.score(X_test)
        scores[limit] = last
    return [scores[int(params["max_depth"])] for params in group]
