"""Candidates: one family trained by one recipe, judged in every fold, and fitted for shipping.

The recipe is: search the family's grid on the fit rows, fit the best parameters on them, set the limit on the
calibration rows. In every fold of every protocol the whole recipe runs anew, so a held-out attack has no part in the
choice of parameters either. What ships is the fit of the protocol `random`, whose search has the full budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from flowsentry import detector as detectors
from flowsentry.detector import Detector, Tail
from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features import paper
from flowsentry.features.splits import Fold, Splits
from flowsentry.features.transform import Transform
from flowsentry.features.views import FeatureSet
from flowsentry.flows.schema import BENIGN, is_malicious
from flowsentry.learning.baselines import FittedBaseline, fit_baselines
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import Family
from flowsentry.learning.model import Parameter
from flowsentry.learning.search import (
    InnerFold,
    Metric,
    SearchResult,
    held_out_folds,
    search,
    stratified_group_folds,
)

Labels = Literal["published", "corrected"]
LABEL_COLUMN: dict[Labels, str] = {"published": "label", "corrected": "corrected"}
SCORED_PARTS = ("test", "validation", "warm-up", "last-tick")


class Recipe(BaseModel):
    """How every family is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: Labels
    """Label set to train on."""
    metric: Metric
    """What the search maximises; `recall_at_fpr` is taken on attacks left out of the inner folds."""
    inner_folds: int
    target_fpr: float
    needs_effect: bool
    seed: int


@dataclass(frozen=True)
class Candidate:
    """A family trained by a recipe."""

    family: str
    search: SearchResult
    """On the fit rows of the protocol `random`."""
    fold_params: dict[str, dict[str, Parameter]]
    """The parameters that the search chose in each fold."""
    scores: pd.DataFrame
    """`fold` (category), `flow` (int64), `score` (surprise), `flagged`, `predicted` (bool): one row for every flow
    that the fold neither fits nor calibrates on; a flow's score is that of its worst report."""
    detector: Detector
    """Fitted on the fit rows of `random`."""
    seconds: float

    def save(self, folder: Path) -> None:
        """Write JSON, Parquet and the detector's own folder; no pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        self.detector.save(folder / "detector")
        self.scores.to_parquet(folder / "scores.parquet", index=False)
        about = _About(
            family=self.family, search=self.search, fold_params=self.fold_params, seconds=self.seconds
        ).model_dump_json(indent=1)
        (folder / "candidate.json").write_text(about, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Candidate:
        """Read what `save` wrote.

        Raises:
            StoreError: something is missing or damaged.
        """
        try:
            about = _About.model_validate_json((folder / "candidate.json").read_text(encoding="utf-8"))
            scores = pd.read_parquet(folder / "scores.parquet")
        except (OSError, ValueError, ValidationError) as error:
            raise StoreError(f"{folder}: not a stored candidate ({str(error).splitlines()[0]})") from error
        return cls(
            about.family, about.search, about.fold_params, scores, Detector.load(folder / "detector"), about.seconds
        )


class _About(BaseModel):
    family: str
    search: SearchResult
    fold_params: dict[str, dict[str, Parameter]]
    seconds: float


def train(
    family: Family,
    features: FeatureSet,
    flows: pd.DataFrame,
    splits: Splits,
    recipe: Recipe,
    on_progress: Callable[[str], None] | None = None,
) -> Candidate:
    """Run the recipe in every fold.

    Args:
        family: a value of `FAMILIES`.
        features: view of the flows.
        flows: flow table with label, corrected, group and exchange.
        splits: of the same flows; must hold the protocol `random`.
        recipe: how to train.
        on_progress: told in a line what is being done.

    Raises:
        ProtocolError: the flows or a fold lack a class, or there is no protocol `random`.
    """
    begin = time.perf_counter()
    _check_labels(flows[LABEL_COLUMN[recipe.labels]])
    if not any(fold.protocol == "random" for fold in splits.folds):
        raise ProtocolError(f"the protocol random, whose fit ships, is impossible: {splits.impossible.get('random')}")
    scores, fold_params = [], {}
    for number, fold in enumerate(splits.folds, start=1):
        if on_progress:
            on_progress(f"{family.title}: fold {number} of {len(splits.folds)}, {fold.name}")
        try:
            result, fitted = fit_fold(family, features, flows, splits, fold, recipe)
        except ProtocolError as error:
            raise ProtocolError(f"{family.title}, {fold.name}: {error}") from error
        fold_params[fold.name] = result.best
        scores.append(score_fold(fitted, features, splits, fold))
        if fold.protocol == "random":
            shipped, of_random = fitted, result
    return Candidate(family.name, of_random, fold_params, _joined(scores), shipped, time.perf_counter() - begin)


def _check_labels(labels: pd.Series) -> None:
    benign, malicious = int(labels.eq(BENIGN).sum()), int(is_malicious(labels).sum())
    if not benign or not malicious:
        raise ProtocolError(
            f"training needs benign and malicious flows, but of {len(labels):,} flows {benign:,} are labelled benign "
            f"and {malicious:,} malicious; give flows with both labels, or train on simulated ones (--data simulate)"
        )


def fit_fold(
    family: Family, features: FeatureSet, flows: pd.DataFrame, splits: Splits, fold: Fold, recipe: Recipe
) -> tuple[SearchResult, Detector]:
    """Search, fit and set the limit on the training rows of one fold."""
    part = splits.parts[fold.name]
    malicious = is_malicious(flows[LABEL_COLUMN[recipe.labels]])
    in_fit = part.eq("fit").to_numpy()
    # What learns nothing from the fit rows may set its limit on their benign flows too.
    calibrating = ["calibration"] if family.learns else ["fit", "calibration"]
    in_calibration = part.isin(calibrating).to_numpy() & ~malicious
    of_row = features.rows["flow"].to_numpy()
    fit_rows, flow = features.rows[in_fit[of_row]], of_row[in_fit[of_row]]
    y, exchange = malicious[flow], flows["exchange"].to_numpy()[flow]
    if len(fit_rows) == 0:
        raise ProtocolError("no flow is left to fit on: give a longer recording")
    manifest = features.manifest
    transform = Transform.fit(fit_rows, manifest.features, "linear" if manifest.name == paper.NAME else "log")
    result = search(
        family,
        transform.apply(fit_rows),
        y,
        harm=[feature.harm for feature in manifest.features],
        folds=_inner_folds(y, flows["group"].iloc[flow].where(y), exchange, recipe),
        metric=recipe.metric,
        seed=recipe.seed,
        exchange=exchange,
        effects=EffectSizes(*transform.minimum_effects()),
        target_fpr=recipe.target_fpr,
        budget="full" if fold.protocol == "random" else "small",
    )
    fitted = detectors.fit(
        family,
        result.best,
        manifest,
        fit_rows,
        y,
        exchange,
        features.rows[in_calibration[of_row]],
        target_fpr=recipe.target_fpr,
        needs_effect=recipe.needs_effect,
        seed=recipe.seed,
    )
    return result, fitted


def score_fold(detector: Detector, features: FeatureSet, splits: Splits, fold: Fold) -> pd.DataFrame:
    """Scores of the flows of a fold that the detector was neither fitted nor calibrated on."""
    wanted = splits.parts[fold.name].isin(SCORED_PARTS).to_numpy()
    rows = features.rows[wanted[features.rows["flow"].to_numpy()]]
    scores, own = detector.judge(rows)
    flow, score = detectors.worst(scores, rows["flow"].to_numpy())
    _, predicted = detectors.worst(own.astype(float), rows["flow"].to_numpy())
    return score_table(fold, flow, score, detector.limit, predicted > 0)


def judge_baselines(
    features: FeatureSet, flows: pd.DataFrame, splits: Splits, recipe: Recipe
) -> dict[str, tuple[FittedBaseline, pd.DataFrame]]:
    """Fit every baseline in every fold, with limits and minimum effects as for candidates.

    Returns:
        By name: the baseline as fitted in the first fold, and its scores as `Candidate.scores`.
    """
    names = [f.name for f in features.manifest.features if f.kind != "category" and not f.identity]
    per_flow = features.rows.groupby("flow")[names].max().reindex(flows.index)
    has_effect = detectors.effect(per_flow, features.manifest.features) | (not recipe.needs_effect)
    malicious = is_malicious(flows[LABEL_COLUMN[recipe.labels]])
    limit = -math.log10(recipe.target_fpr)
    first: dict[str, FittedBaseline] = {}
    scores: dict[str, list[pd.DataFrame]] = {}
    for fold in splits.folds:
        part = splits.parts[fold.name]
        fit = part.eq("fit").to_numpy()
        calibration = part.eq("calibration").to_numpy() & ~malicious
        judged = part.isin(SCORED_PARTS).to_numpy()
        for baseline in fit_baselines(flows[fit], per_flow[fit], malicious[fit], recipe.seed):
            first.setdefault(baseline.name, baseline)
            tail = Tail.fit(baseline.score(flows[calibration], per_flow[calibration]))
            raw = baseline.score(flows[judged], per_flow[judged])
            surprise = np.where(has_effect[judged], tail.surprise(raw), 0.0)
            table = score_table(fold, np.flatnonzero(judged), surprise, limit, raw > 0)
            scores.setdefault(baseline.name, []).append(table)
    return {name: (first[name], _joined(tables)) for name, tables in scores.items()}


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    table["fold"] = table["fold"].astype("category")
    return table


def score_table(fold: Fold, flow: np.ndarray, score: np.ndarray, limit: float, predicted: np.ndarray) -> pd.DataFrame:
    """The columns of `Candidate.scores` for one fold."""
    return pd.DataFrame(
        {
            "fold": pd.Categorical([fold.name] * len(flow)),
            "flow": flow.astype(np.int64),
            "score": score,
            "flagged": score >= limit,
            "predicted": predicted,
        }
    )


def _inner_folds(y: np.ndarray, group: pd.Series, exchange: np.ndarray, recipe: Recipe) -> list[InnerFold]:
    if recipe.metric == "recall_at_fpr" and group.nunique() >= 2:
        return held_out_folds(y, group.reset_index(drop=True), exchange, recipe.inner_folds, recipe.seed)
    return stratified_group_folds(y, exchange, recipe.inner_folds, recipe.seed)
