"""The search against scikit-learn's GridSearchCV: same grids, folds, metric and cores, one run.

    make bench ONLY=sweep

Prints, per family of the original study, the best mean accuracy over three folds of 70% of the flows (view `paper`),
the seconds of both, and their ratio; the last line is the sum. The same as JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from _data import DEFAULT, recording
from sklearn.model_selection import GridSearchCV, train_test_split

from flowsentry.features import build as features
from flowsentry.features.paper import FEATURES
from flowsentry.features.transform import Transform
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.families import FAMILIES, build
from flowsentry.learning.search import search, stratified_group_folds

STUDY = ("logistic_regression", "svc", "knn", "decision_tree")


def training_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X float64 [n x 10] and y bool [n] of a random 70% of the flows."""
    reports = recording(path)
    reports["flow"] = identify(reports)
    flows = collapse(reports)
    y = is_malicious(flows["label"])
    rows: pd.DataFrame = features.build("paper", reports, flows, {}).rows
    train, _ = train_test_split(np.arange(len(y)), test_size=0.3, random_state=0, stratify=y)
    return Transform.fit(rows.iloc[train], FEATURES, "linear").apply(rows.iloc[train]), y[train]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("flows", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--families", nargs="+", default=STUDY, choices=STUDY)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    X, y = training_rows(arguments.flows)
    cores = joblib.cpu_count()
    print(f"{len(y):,} training rows, {cores} cores")
    harm = np.zeros(X.shape[1], dtype=np.int8)
    folds = stratified_group_folds(y, np.arange(len(y)), 3, 0)
    figures = {}
    # The worker processes of the plain grid search start here, not on its clock.
    joblib.Parallel(n_jobs=cores)(joblib.delayed(np.sum)(X[:100]) for _ in range(2 * cores))
    for name in arguments.families:
        family = FAMILIES[name]
        start = time.perf_counter()
        ours = search(family, X, y, harm=harm, folds=folds, metric="accuracy", seed=0, target_fpr=0.005)
        between = time.perf_counter()
        plain = GridSearchCV(
            build(family, {}, harm, 0),
            {parameter: list(values) for parameter, values in family.grid.items()},
            scoring="accuracy",
            cv=folds,
            n_jobs=cores,
            refit=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.fit(X, y.astype(np.int8))
        end = time.perf_counter()
        figures[name] = {
            "candidates": len(family.candidates),
            "best": ours.best,
            "best_of_grid": plain.best_params_,
            "accuracy": ours.score,
            "accuracy_of_grid": float(plain.best_score_),
            "seconds": between - start,
            "seconds_of_grid": end - between,
        }
        print(
            f"{name:20} accuracy {ours.score:.5f} / {plain.best_score_:.5f}   "
            f"{between - start:7.2f} s / {end - between:7.2f} s   ratio {(between - start) / (end - between):.3f}   "
            f"{ours.best}",
            flush=True,
        )
    seconds, of_grid = (sum(f[key] for f in figures.values()) for key in ("seconds", "seconds_of_grid"))
    print(f"{'together':20} {seconds:.1f} s / {of_grid:.1f} s   ratio {seconds / of_grid:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
