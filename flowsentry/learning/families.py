"""The model families, their grids, and how one of them is fitted."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from flowsentry.errors import ProtocolError
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.model import Model, Parameter, Parameters, one_thread
from flowsentry.learning.tails import SignedTails

logger = logging.getLogger(__name__)

TAILS_QUANTILE: Final = 0.999
"""Share of benign training rows that a benign-only model calls benign by its own predict."""


@dataclass(frozen=True)
class Family:
    """A kind of model and the parameters that are tried for it."""

    name: str
    title: str
    supervised: bool
    """False: fitted on benign rows alone."""
    grid: dict[str, tuple[Parameter, ...]]
    row_cap: int | None
    """Training uses at most so many rows: the cost of the family grows faster than the rows do."""
    learns: bool = True
    """False: its scores do not depend on any row."""

    @property
    def candidates(self) -> tuple[dict[str, Parameter], ...]:
        """All combinations of the grid; the last parameter varies fastest."""
        return tuple(dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))


FAMILIES: Final[dict[str, Family]] = {
    family.name: family
    for family in (
        Family(
            "logistic_regression",
            "Logistic regression",
            True,
            {"C": (0.1, 1.0, 10.0), "solver": ("newton-cg", "lbfgs", "liblinear")},
            None,
        ),
        Family(
            "svc",
            "Support vectors",
            True,
            {"C": (0.1, 1.0, 10.0), "gamma": (1.0, 0.1, 0.01), "kernel": ("rbf", "poly", "sigmoid")},
            50_000,
        ),
        Family(
            "knn",
            "Nearest neighbours",
            True,
            {
                "n_neighbors": (3, 5, 11),
                "weights": ("uniform", "distance"),
                "metric": ("euclidean", "manhattan"),
            },
            50_000,
        ),
        Family(
            "decision_tree",
            "Decision tree",
            True,
            {
                "max_depth": (3, 5, 10, 20),
                "min_samples_leaf": (1, 2, 4),
                "criterion": ("gini", "entropy"),
            },
            None,
        ),
        Family(
            "gradient_boosting",
            "Gradient boosting",
            True,
            {"max_leaf_nodes": (8, 31), "learning_rate": (0.1, 0.3)},
            None,
        ),
        Family("effects", "Effect sizes (fixed)", False, {}, None, learns=False),
        Family("tails", "Signed tails (benign only)", False, {"combine": ("max", "top3", "sum")}, None),
    )
}
"""The first four are the grids of the original study: 9 + 27 + 12 + 24 = 72 candidates."""


def build(family: Family, params: Parameters, harm: NDArray[np.int8], seed: int) -> Any:
    """An unfitted scikit-learn estimator; what the grid does not name is scikit-learn's default.

    Boosting is monotone in every feature whose direction of harm is known, has 60 trees and no early
    stopping, which would set rows aside at random and so split twins. Neighbours use a k-d tree at every
    width: its distances, unlike those of the matrix product that is the default above 15 features, do not
    depend on the batch.
    """
    match family.name:
        case "logistic_regression":
            return LogisticRegression(random_state=seed, **params)
        case "svc":
            return SVC(random_state=seed, **params)
        case "knn":
            return KNeighborsClassifier(algorithm="kd_tree", **params)
        case "decision_tree":
            return DecisionTreeClassifier(random_state=seed, **params)
        case "gradient_boosting":
            return HistGradientBoostingClassifier(
                max_iter=60, early_stopping=False, monotonic_cst=harm.tolist(), random_state=seed, **params
            )
        case _:
            raise ValueError(f"{family.name} is no family of scikit-learn's")


def fit(
    family: Family,
    params: Parameters,
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    harm: Sequence[int] | NDArray[np.int8],
    seed: int,
    *,
    exchange: NDArray[np.int64] | None = None,
    effects: EffectSizes | None = None,
) -> Model:
    """Fit one candidate.

    Args:
        family: a value of `FAMILIES`.
        params: one of `family.candidates`.
        X: float64 [n x d], finite.
        y: bool [n], True is malicious. Benign-only families ignore malicious rows.
        harm: [d] direction of harm of each feature: -1, 0 or 1.
        seed: for estimators with chance in them, and for the sample of a family with a row cap.
        exchange: int64 [n], the exchange of each row: a sample takes exchanges whole.
        effects: the view's minimum effects, for the family of that name.

    Returns:
        The fitted model.

    Raises:
        ProtocolError: a class that the family needs is missing, or the view states no minimum effect.
    """
    directions = np.asarray(harm, dtype=np.int8)
    if family.row_cap is not None and len(y) > family.row_cap:
        rows = sample(y, family.row_cap, seed, exchange)
        logger.info("%s: fitted on %d of %d rows", family.title, len(rows), len(y))
        X, y = X[rows], y[rows]
    if y.all() or (family.supervised and not y.any()):
        missing = "benign" if y.all() else "malicious"
        raise ProtocolError(f"{family.title} cannot be trained: no {missing} flow is among the training rows")
    # Filters of warnings are global: `search`, which fits in threads, sets them once around all of them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = fit_rows(family, params, X, y, directions, seed, effects)
    if family.name == "logistic_regression" and model.estimator.n_iter_.max() >= model.estimator.max_iter:
        logger.info("%s with %s stopped before it converged", family.title, model.params)
    return model


def fit_rows(
    family: Family,
    params: Parameters,
    X: NDArray[np.float64],
    y: NDArray[np.bool_],
    harm: NDArray[np.int8],
    seed: int,
    effects: EffectSizes | None,
) -> Model:
    """`fit` on exactly these rows, which must hold the classes that the family needs; warnings are not hidden."""
    if family.supervised:
        with one_thread():
            estimator = build(family, params, harm, seed).fit(X, y.astype(np.int8))
        return Model(family.name, dict(params), estimator, X.shape[1], 0.0)
    benign = X[~y]
    estimator = effects if family.name == "effects" else SignedTails.fit(benign, harm)
    if estimator is None or (isinstance(estimator, EffectSizes) and np.isnan(estimator.minimum).all()):
        raise ProtocolError(f"the view states no minimum effects: leave the family {family.name} out of families")
    model = Model(family.name, dict(params), estimator, X.shape[1], 0.0)
    return replace(model, boundary=float(np.quantile(model.score(benign), TAILS_QUANTILE)))


def sample(y: NDArray[np.bool_], rows: int, seed: int, exchange: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Rows of a seeded sample that keeps the share of both classes and takes exchanges whole.

    Args:
        y: bool [n].
        rows: at most so many, apart from the remainder of the last exchange of each class.
        seed: chooses the exchanges.
        exchange: int64 [n]; None: every row is an exchange of its own.

    Returns:
        Ascending row numbers, int64.
    """
    if len(y) <= rows:
        return np.arange(len(y), dtype=np.int64)
    keys = np.arange(len(y)) if exchange is None else np.unique(exchange, return_inverse=True)[1]
    place = np.random.default_rng(seed).permutation(int(keys.max()) + 1)[keys]
    chosen = []
    for malicious in (False, True):
        members = np.flatnonzero(y == malicious)
        wanted = max(1, round(rows * len(members) / len(y)))
        if len(members):
            last = np.sort(place[members])[min(wanted, len(members)) - 1]
            chosen.append(members[place[members] <= last])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
