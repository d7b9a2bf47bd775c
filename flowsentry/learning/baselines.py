"""Baselines: what a score is worth is seen beside models that cannot have learned what an attack is.

All of them score by smoothed log-odds learned from training rows, so malicious is what scores above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.tree import DecisionTreeClassifier

from flowsentry.errors import ProtocolError
from flowsentry.learning.families import sample
from flowsentry.learning.model import node_scores, smoothed_log_odds
from flowsentry.learning.search import measure, stratified_group_folds

Scorer = Callable[[pd.DataFrame, pd.DataFrame | None], NDArray[np.float64]]
"""Scores of flows and their features."""
Reader = Callable[[pd.DataFrame, pd.DataFrame | None], NDArray[np.float64]]
"""Numbers of one column, float64[n]."""

PORT_SUPPORT: Final = 10
"""Training flows that a port must have to enter the port rule."""
COLUMN_DEPTH: Final = 3
"""Depth of a tree on a single column: bands of values, not a list of them."""
COLUMN_ROWS: Final = 10_000
"""Training rows on which the best single column is chosen; it is then fitted on all."""
TARGET_FPR: Final = 0.005
"""False positive rate at which the recall of single columns is compared."""


@dataclass(frozen=True)
class FittedBaseline:
    """One baseline after training."""

    name: str
    title: str
    uses_identity: bool
    """It reads an address, a port, an id or a time: it cannot hold on another cluster or another day."""
    learned: str
    """What it learned, for people."""
    scorer: Scorer

    def score(self, flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        """Smoothed log-odds, float64[n]; above 0 is malicious by the baseline's own decision.

        Args:
            flows: flow table with the canonical columns.
            features: the view's columns for the same rows, as at training; None if there were none.
        """
        return self.scorer(flows, features)


def fit_baselines(
    flows: pd.DataFrame, features: pd.DataFrame | None, y: NDArray[np.bool_], seed: int
) -> list[FittedBaseline]:
    """Fit all baselines: constant, best single column, port rule, flow id, timestamp.

    Args:
        flows: training rows of the flow table.
        features: the view's columns for the same rows, numbers, or None. The best single column is chosen among
            them and bytes, duration, final and transport.
        y: bool [n], True is malicious.
        seed: of the folds on which the best single column is chosen.

    Raises:
        ProtocolError: a class is missing.
    """
    if y.all() or not y.any():
        raise ProtocolError("baselines need benign and malicious flows among the training rows")
    return [
        _constant(y),
        _best_column(flows, features, y, seed),
        _port_rule(flows, y),
        _flow_id(flows, y, seed),
        _timestamp(flows, y, seed),
    ]


def _constant(y: NDArray[np.bool_]) -> FittedBaseline:
    share = float(y.mean())
    value = float(smoothed_log_odds(np.array([share]), len(y))[0])
    return FittedBaseline(
        "constant",
        "Constant",
        False,
        f"always {'malicious' if value > 0 else 'benign'}: {share:.1%} of the training flows are malicious",
        lambda flows, features: np.full(len(flows), value),
    )


def _port_rule(flows: pd.DataFrame, y: NDArray[np.bool_]) -> FittedBaseline:
    columns = ("src_port", "dst_port")
    odds: dict[str, pd.Series] = {}
    hit = np.zeros(len(flows), dtype=bool)
    for column in columns:
        ports = _port(flows, column)
        counts = pd.DataFrame({"port": ports, "y": y})[ports >= 0].groupby("port")["y"].agg(["mean", "size"])
        counts = counts[(counts["mean"] > 0.5) & (counts["size"] >= PORT_SUPPORT)]
        log_odds = smoothed_log_odds(counts["mean"].to_numpy(np.float64), counts["size"].to_numpy(np.float64))
        odds[column] = pd.Series(log_odds, index=counts.index, dtype="float64")
        hit |= np.isin(ports, counts.index)
    rest = y[~hit]
    otherwise = float(smoothed_log_odds(np.array([rest.mean() if len(rest) else 0.0]), len(rest))[0])

    def score(flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        found = [pd.Series(_port(flows, column)).map(odds[column]).to_numpy(np.float64) for column in columns]
        best = np.fmax(*found)
        return np.where(np.isnan(best), otherwise, best)

    named = [
        f"{title} {', '.join(str(port) for port in odds[column].sort_values(ascending=False).index[:8])}"
        f"{f' and {len(odds[column]) - 8} more' if len(odds[column]) > 8 else ''}"
        for column, title in zip(columns, ("from port", "to port"), strict=True)
        if len(odds[column])
    ]
    return FittedBaseline("port_rule", "Port rule", True, "; ".join(named) or "no port stands out", score)


def _flow_id(flows: pd.DataFrame, y: NDArray[np.bool_], seed: int) -> FittedBaseline:
    known = np.array(sorted(set(flows["flow_id"].astype(str))), dtype=object)

    def rank(flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        return np.searchsorted(known, flows["flow_id"].astype(str).to_numpy(dtype=object)).astype(np.float64)

    scorer = _tree(rank, flows, None, y, None, seed)
    return FittedBaseline("flow_id", "Flow id alone", True, "a tree on the rank of the flow id", scorer)


def _timestamp(flows: pd.DataFrame, y: NDArray[np.bool_], seed: int) -> FittedBaseline:
    first = flows["time"].min()

    # Trees read float32, in which seconds since 1970 would be minutes apart.
    def seconds(flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        return np.asarray((flows["time"] - first).dt.total_seconds(), np.float64)

    scorer = _tree(seconds, flows, None, y, 5, seed)
    return FittedBaseline("timestamp", "Timestamp alone", True, "a tree of depth 5 on the time of the report", scorer)


def _best_column(flows: pd.DataFrame, features: pd.DataFrame | None, y: NDArray[np.bool_], seed: int) -> FittedBaseline:
    texts = sorted(str(text) for text in flows["transport"].dropna().unique())

    def transport(flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        return np.asarray(pd.Categorical(flows["transport"].astype("object"), categories=texts).codes, np.float64)

    readers: dict[str, Reader] = {name: _of_flows(name) for name in ("bytes", "duration", "final")}
    readers["transport"] = transport
    for name in () if features is None else features.columns:
        readers.setdefault(str(name), _of_features(str(name)))
    exchange = flows["exchange"].to_numpy(np.int64) if "exchange" in flows else np.arange(len(flows), dtype=np.int64)
    rows = sample(y, COLUMN_ROWS, seed, exchange)
    folds = stratified_group_folds(y[rows], exchange[rows], 3, seed)
    # Few exchanges may leave a fold without a class; it cannot tell columns apart.
    folds = [fold for fold in folds if all(0 < y[rows][side].sum() < len(side) for side in fold)]
    some_flows, some_features = flows.iloc[rows], None if features is None else features.iloc[rows]

    def recall(reader: Reader) -> float:
        values = reader(some_flows, some_features)
        per_fold = []
        for train, test in folds:
            scores = _tree_scores(values[train], y[rows][train], COLUMN_DEPTH, seed)(values[test])
            per_fold.append(measure("recall_at_fpr", y[rows][test], scores, scores > 0, TARGET_FPR))
        return float(np.mean(per_fold)) if per_fold else 0.0

    recalls = {name: recall(reader) for name, reader in readers.items()}
    best = max(recalls, key=lambda name: recalls[name])
    return FittedBaseline(
        "best_column",
        "Best single column",
        False,
        f"{best}, by recall at {TARGET_FPR:.1%} false positives within the training flows",
        _tree(readers[best], flows, features, y, COLUMN_DEPTH, seed),
    )


def _tree(
    reader: Reader,
    flows: pd.DataFrame,
    features: pd.DataFrame | None,
    y: NDArray[np.bool_],
    depth: int | None,
    seed: int,
) -> Scorer:
    scores = _tree_scores(reader(flows, features), y, depth, seed)
    return lambda flows, features: scores(reader(flows, features))


def _tree_scores(
    values: NDArray[np.float64], y: NDArray[np.bool_], depth: int | None, seed: int
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    tree = DecisionTreeClassifier(max_depth=depth, random_state=seed).fit(values[:, None], y.astype(np.int8))
    by_node = node_scores(tree)

    def scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
        leaves: NDArray[np.int64] = tree.apply(values[:, None])
        return by_node[leaves]

    return scores


def _port(flows: pd.DataFrame, column: str) -> NDArray[np.int64]:
    return flows[column].fillna(-1).to_numpy(np.int64)


def _of_flows(name: str) -> Reader:
    return lambda flows, features: flows[name].to_numpy(np.float64)


def _of_features(name: str) -> Reader:
    def read(flows: pd.DataFrame, features: pd.DataFrame | None) -> NDArray[np.float64]:
        if features is None:
            raise ValueError(f"the baseline was trained with the feature {name}; give the features to score")
        return features[name].to_numpy(np.float64)

    return read
