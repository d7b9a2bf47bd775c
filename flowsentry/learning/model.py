"""A fitted model of any family: score, predict, save and load without pickle.

scikit-learn's linear models, support vectors and trees are stored by skops, which constructs only types that
it or `TRUSTED` names; neighbours and tails are plain arrays. A folder holds `model.json` and one file of
parameters, whose SHA-256 is in the JSON. What was loaded is also checked for shape: trees and support vectors
are read by compiled code that trusts its indices.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
import sklearn
import skops.io
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import ThreadpoolController

from flowsentry.errors import StoreError
from flowsentry.flows.hashing import compiled
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.tails import COMBINATIONS, SignedTails

TRUSTED: Final = (
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
)
"""Types that a stored estimator may hold beyond those that skops itself trusts."""

ESTIMATORS: Final[Mapping[str, type[Any]]] = {
    "logistic_regression": LogisticRegression,
    "svc": SVC,
    "knn": KNeighborsClassifier,
    "decision_tree": DecisionTreeClassifier,
    "gradient_boosting": HistGradientBoostingClassifier,
    "effects": EffectSizes,
    "tails": SignedTails,
}
_ARRAYS: Final = ("knn", "effects", "tails")
_FORMAT: Final = 1
_CHUNK: Final = 2000

Parameter = str | int | float
Parameters = Mapping[str, Parameter]


def smoothed_log_odds(share: NDArray[np.float64], rows: NDArray[np.float64] | int) -> NDArray[np.float64]:
    """Log-odds of a share of `rows` malicious rows, half a row added to each class (Haldane's correction)."""
    return np.log((share * rows + 0.5) / ((1 - share) * rows + 0.5))


def one_thread() -> AbstractContextManager[Any]:
    """Compiled code called by this thread uses no further OpenMP threads.

    Boosting's would wait for one another in busy loops: where other processes want the cores too, fits that take a
    tenth of a second then take ten.
    """
    limit: AbstractContextManager[Any] = _thread_pools().limit(limits=1, user_api="openmp")
    return limit


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def _threaded(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], X: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Apply a function of rows that releases the GIL to chunks of rows, on all cores."""
    workers = joblib.cpu_count()
    if workers == 1 or len(X) <= _CHUNK:
        return function(X)
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(function, np.array_split(X, -(-len(X) // _CHUNK)))))


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted model; scores of a row never depend on the rows that are scored with it."""

    family: str
    params: dict[str, Parameter]
    estimator: Any
    """The fitted scikit-learn estimator, or `SignedTails`."""
    features: int
    boundary: float
    """`predict` is `score > boundary`: 0 for supervised families, which equals the estimator's own predict;
    for benign-only families, which have none, the 99.9% quantile of the benign training scores."""

    def score(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """How bad each row is, float64[n], higher is worse, on a scale of the family's own.

        Linear models and support vectors: decision function. Boosting: log-odds. Trees and neighbours:
        smoothed log-odds of the leaf's or the neighbours' malicious share. Tails: combined surprise. Effects:
        excess over the minimum effects.

        Args:
            X: float64 [n x d], finite, the features in the order of training.

        Raises:
            ValueError: X has another number of columns.
        """
        X = np.ascontiguousarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] != self.features:
            raise ValueError(f"rows of {self.features} features expected, not an array of shape {X.shape}")
        if not len(X):
            return np.empty(0)
        match self.family:
            case "logistic_regression":
                return np.asarray(_linear(X, self.estimator.coef_[0], self.estimator.intercept_[0]))
            case "svc":
                return _threaded(self.estimator.decision_function, X)
            case "knn":
                neighbours = self.estimator.n_neighbors
                return smoothed_log_odds(_threaded(self._malicious_share, X), neighbours)
            case "decision_tree":
                leaves: NDArray[np.int64] = self.estimator.tree_.apply(X.astype(np.float32))
                return self._node_scores[leaves]
            case "gradient_boosting":
                return _threaded(self._boosted, X)
            case "effects":
                return np.asarray(self.estimator.score(X))
            case _:
                return np.asarray(self.estimator.score(X, self.params["combine"]))

    def predict(self, X: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Malicious or not, bool[n], by the estimator's own decision."""
        return self.score(X) > self.boundary

    @cached_property
    def _node_scores(self) -> NDArray[np.float64]:
        return node_scores(self.estimator)

    def _malicious_share(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.estimator.predict_proba(X)[:, 1])

    def _boosted(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        with one_thread():
            return np.asarray(self.estimator.decision_function(X))

    def save(self, folder: Path) -> None:
        """Write `model.json` and the parameters into a folder, which is made if absent; always the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / ("model.npz" if self.family in _ARRAYS else "model.skops")
        if self.family in ("effects", "tails"):
            stored.write_bytes(_archive(self.estimator.to_arrays()))
        elif self.family == "knn":
            arrays = {"X": self.estimator._fit_X, "y": self.estimator._y.astype(np.int8)}
            stored.write_bytes(_archive(arrays))
        else:
            stored.write_bytes(_reproducible(skops.io.dumps(self.estimator)))
        about = {
            "format": _FORMAT,
            "family": self.family,
            "params": self.params,
            "features": self.features,
            "boundary": self.boundary,
            "file": stored.name,
            "sha256": hashlib.sha256(stored.read_bytes()).hexdigest(),
            "scikit_learn": sklearn.__version__,
        }
        (folder / "model.json").write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Model:
        """Read what `save` wrote; the scores are equal bit by bit.

        Raises:
            StoreError: the folder holds no model, a damaged or altered one, one of another version, or one
            with a
                type that no model of ours has.
        """
        try:
            about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            family, params = str(about["family"]), dict(about["params"])
            features, boundary = int(about["features"]), float(about["boundary"])
            if about["format"] != _FORMAT or family not in ESTIMATORS:
                raise StoreError(f"{folder}: model of format {about['format']}, family {family}; train it again")
            if about["scikit_learn"] != sklearn.__version__:
                raise StoreError(
                    f"{folder}: stored with scikit-learn {about['scikit_learn']}, not {sklearn.__version__}; "
                    "install that version or train the model again"
                )
            stored = folder / ("model.npz" if family in _ARRAYS else "model.skops")
            if hashlib.sha256(stored.read_bytes()).hexdigest() != about["sha256"]:
                raise StoreError(f"{stored}: the digest is not the one in model.json; the file was altered")
            model = cls(family, params, _read(stored, family, params), features, boundary)
            _check(model)
        except StoreError:
            raise
        # The readers of these formats raise whatever they meet in a hostile file.
        except Exception as error:
            raise StoreError(f"{folder}: not a stored model ({type(error).__name__}: {error})") from error
        return model


def _archive(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `numpy.savez` writes, with bytes that do not depend on the release of Python, or of zlib."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    return result.getvalue()


def _reproducible(stored: bytes) -> bytes:
    """The same content without what differs each time: skops names objects by their place in memory, and the hour."""
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(contents.pop("schema.json"))
    numbers: dict[int, int] = {}
    _renumber(schema, numbers, itertools.count())
    renamed = {f"{numbers[int(Path(name).stem)]}.npy": content for name, content in contents.items()}
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, content in sorted(renamed.items()):
            archive.writestr(zipfile.ZipInfo(name), _without_padding(content))
        archive.writestr(zipfile.ZipInfo("schema.json"), json.dumps(schema, indent=2))
    return result.getvalue()


def _without_padding(content: bytes) -> bytes:
    """An array file whose records have zeros between their fields, where memory holds anything."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype.names is None:
        return content
    clean = np.zeros(array.shape, array.dtype)
    for name in array.dtype.names:
        clean[name] = array[name]
    result = io.BytesIO()
    np.save(result, clean, allow_pickle=False)
    return result.getvalue()


def _renumber(node: Any, numbers: dict[int, int], following: Iterator[int]) -> None:
    """Number objects in order of appearance; plain values, which Python may or may not share, one by one."""
    if isinstance(node, list):
        for item in node:
            _renumber(item, numbers, following)
    elif isinstance(node, dict):
        if "__id__" in node:
            identity = node["__id__"]
            shared = node["__loader__"] != "JsonNode"
            node["__id__"] = numbers[identity] if shared and identity in numbers else next(following)
            if shared:
                numbers[identity] = node["__id__"]
            if "file" in node:
                node["file"] = f"{node['__id__']}.npy"
        for item in list(node.values()):
            _renumber(item, numbers, following)


@compiled
def _linear(X: NDArray[np.float64], weights: NDArray[np.float64], intercept: float) -> NDArray[np.float64]:
    # BLAS sums in an order that depends on the number of rows; a row's score must not.
    scores = np.empty(len(X))
    for i in range(len(X)):
        score = intercept
        for j in range(len(weights)):
            score += X[i, j] * weights[j]
        scores[i] = score
    return scores


def node_scores(estimator: DecisionTreeClassifier) -> NDArray[np.float64]:
    """Smoothed log-odds of the malicious share at every node of a decision tree, float64[nodes]."""
    tree = estimator.tree_
    return smoothed_log_odds(tree.value[:, 0, 1], tree.n_node_samples.astype(np.float64))


def _read(stored: Path, family: str, params: dict[str, Parameter]) -> Any:
    if family not in _ARRAYS:
        return skops.io.load(stored, trusted=list(TRUSTED))
    with np.load(stored, allow_pickle=False) as archive:
        arrays = dict(archive)
    if family == "effects":
        return EffectSizes(arrays["minimum"], arrays["unit"])
    if family == "tails":
        return SignedTails.from_arrays(arrays)
    # The tree of neighbours is a function of the rows, so rows are all that is stored.
    return KNeighborsClassifier(algorithm="kd_tree", **params).fit(arrays["X"], arrays["y"])


def _check(model: Model) -> None:
    """Refuse an estimator of another kind and indices that point outside their arrays.

    Raises:
        ValueError: something does not fit.
    """
    estimator, features = model.estimator, model.features
    if type(estimator) is not ESTIMATORS[model.family]:
        raise ValueError(f"a {type(estimator).__name__} instead of {model.family}")
    if model.family == "effects":
        if not estimator.minimum.shape == estimator.unit.shape == (features,) or np.isnan(estimator.minimum).all():
            raise ValueError("effect sizes do not fit their description")
        return
    if model.family == "tails":
        if estimator.features != features or model.params.get("combine") not in COMBINATIONS:
            raise ValueError("tails do not fit their description")
        return
    if estimator.n_features_in_ != features or list(estimator.classes_) != [0, 1]:
        raise ValueError("the estimator does not fit its description")
    if model.family == "logistic_regression":
        sound = estimator.coef_.shape == (1, features) and estimator.intercept_.shape == (1,)
    elif model.family == "svc":
        vectors = len(estimator.support_vectors_)
        sound = (
            estimator.support_vectors_.shape == (vectors, features)
            and estimator._n_support.shape == (2,)
            and estimator._n_support.min() >= 0
            and estimator._n_support.sum() == vectors == len(estimator.support_)
            and estimator._dual_coef_.shape == (1, vectors)
            and estimator._intercept_.shape == (1,)
        )
    elif model.family == "decision_tree":
        tree = estimator.tree_
        inner = tree.children_left != -1
        sound = (
            tree.n_features == features
            and tree.value.shape == (tree.node_count, 1, 2)
            and _is_tree(tree.children_left, tree.children_right, inner)
            and _within(tree.feature[inner], features)
        )
    elif model.family == "gradient_boosting":
        nodes = [tree.nodes for trees in estimator._predictors for tree in trees]
        sound = all(
            _is_tree(n["left"].astype(np.int64), n["right"].astype(np.int64), n["is_leaf"] == 0)
            and _within(n["feature_idx"][n["is_leaf"] == 0], features)
            and not n["is_categorical"].any()
            for n in nodes
        )
    else:
        sound = True
    if not sound:
        raise ValueError("the estimator points outside its own arrays")


def _within(index: NDArray[np.integer[Any]], size: int) -> bool:
    return bool(((index >= 0) & (index < size)).all())


def _is_tree(left: NDArray[np.integer[Any]], right: NDArray[np.integer[Any]], inner: NDArray[np.bool_]) -> bool:
    """Children come after their parent, so every walk ends, and inside the array."""
    nodes = np.arange(len(left))
    return bool(len(left) and all(((side > nodes) & (side < len(left)))[inner].all() for side in (left, right)))
