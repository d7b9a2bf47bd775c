"""The one path from flows to verdicts: transform, model, calibration and limit of one view, in one object.

Evaluation, batch inference and whatever serves a model call it: what is tested is what is served.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features import behaviour, paper
from flowsentry.features.transform import Transform
from flowsentry.features.views import Feature, ViewManifest
from flowsentry.flows import reports as flow_reports
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import Family
from flowsentry.learning.families import fit as fit_model
from flowsentry.learning.model import Model, Parameters

CEILING: Final = 12.0
"""Highest surprise: the tail of a few thousand flows says nothing beyond it."""
TAIL_SHARE: Final = 0.01
"""Share of the calibration flows whose scores the exponential tail is fitted to."""
KNOTS: Final = 1000


class Tail(BaseModel):
    """How rare a score is among benign flows that the model was not fitted on.

    Below the 99% point the share of calibration flows that score at least as high; above it an exponential tail
    fitted to the mean excess (Pickands 1975, with shape 0).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: list[float] = Field(min_length=1)
    """Ascending knots of calibration scores, up to the 99% point."""
    surprises: list[float]
    """-log10 of the share of calibration flows that score at least as high as each knot."""
    excess: float = Field(ge=0)
    """Mean excess over the last knot."""

    @model_validator(mode="after")
    def _in_order(self) -> Tail:
        knots = np.array([self.scores, self.surprises]) if len(self.scores) == len(self.surprises) else np.empty((2, 0))
        if not knots.size or not np.isfinite(knots).all() or (np.diff(knots) < 0).any():
            raise ValueError("the knots are not pairs in ascending order")
        return self

    @classmethod
    def fit(cls, scores: np.ndarray) -> Tail:
        """Calibrate on the scores of benign flows, float64, at least one."""
        ordered = np.sort(scores)
        threshold = ordered[-math.ceil(TAIL_SHARE * len(ordered))]
        excess = float(np.mean(ordered[ordered >= threshold] - threshold))
        knots = np.unique(ordered[ordered <= threshold])
        if len(knots) > KNOTS:
            knots = knots[np.unique(np.linspace(0, len(knots) - 1, KNOTS).round().astype(int))]
        as_high = len(ordered) - np.searchsorted(ordered, knots, side="left")
        return cls(
            scores=knots.tolist(),
            surprises=(-np.log10((1 + as_high) / (len(ordered) + 1))).tolist(),
            excess=excess,
        )

    def surprise(self, scores: np.ndarray) -> np.ndarray:
        """-log10 of the share of benign flows expected to score as high; 0..CEILING."""
        knots = np.array(self.scores)
        surprise = np.interp(scores, knots, self.surprises, left=0.0)
        beyond = np.maximum(scores - knots[-1], 0)
        spread = max(self.excess, 1e-9)
        return np.asarray(np.minimum(surprise + beyond / spread / math.log(10), CEILING))


class _Limit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target_fpr: float = Field(gt=0, le=1)
    needs_effect: bool


@dataclass(frozen=True)
class Detector:
    """A model with everything that a raw flow needs to become a verdict."""

    manifest: ViewManifest
    transform: Transform
    model: Model
    tail: Tail
    target_fpr: float
    needs_effect: bool
    """Flag only flows with at least one feature at its minimum effect."""
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Surprise at and above which a flow is flagged."""
        return -math.log10(self.target_fpr)

    def score(self, rows: pd.DataFrame) -> np.ndarray:
        """Surprise of rows of the view, float64 [rows]; 0 where no feature reaches its minimum effect."""
        surprise = np.zeros(len(rows))
        effect = self._effect(rows)
        if effect.any():
            surprise[effect] = self.tail.surprise(self.model.score(self.transform.apply(rows[effect])))
        return surprise

    def judge(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Score, and what the model's own decision says without limit and minimum effect, as the study did.

        Returns:
            float64 [rows] as `score`, and bool [rows].
        """
        raw = self.model.score(self.transform.apply(rows))
        return np.where(self._effect(rows), self.tail.surprise(raw), 0.0), raw > self.model.boundary

    def verdicts(self, reports: pd.DataFrame) -> pd.DataFrame:
        """Judge whole recordings of raw reports.

        Args:
            reports: canonical reports; each recording is a stream of its own, in arrival order.

        Returns:
            One row per report: `flow` (number), `anomaly_score` (the flow's worst so far), `threshold`, `label`,
            `warm` (the stream's baseline is past its warm-up). View `paper` judges a flow's last report only and
            has one row per flow.
        """
        reports = reports.assign(flow=flow_reports.identify(reports))
        if self.manifest.name == paper.NAME:
            judged = flow_reports.collapse(reports)
            rows = paper.compute(judged)
        else:
            judged = reports
            rows, _ = behaviour.compute(reports)
        score = pd.Series(self.score(rows), index=judged.index)
        worst = score.groupby(judged["flow"].to_numpy()).cummax()
        begin = judged.groupby("recording", observed=True)["time"].transform("min")
        warm_up = pd.Timedelta(seconds=self.manifest.warm_up_seconds)
        return pd.DataFrame(
            {
                "flow": judged["flow"].to_numpy(),
                "anomaly_score": worst.to_numpy(),
                "threshold": self.limit,
                "label": np.where(worst >= self.limit, MALICIOUS, BENIGN),
                "warm": (judged["time"] - begin >= warm_up).to_numpy(),
            }
        )

    def with_card(self, card: dict[str, Any]) -> Detector:
        return replace(self, card=card)

    def _effect(self, rows: pd.DataFrame) -> np.ndarray:
        return effect(rows, self.manifest.features) if self.needs_effect else np.ones(len(rows), bool)

    def save(self, folder: Path) -> None:
        """Write JSON files and the model's own folder; no pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder / "model")
        (folder / "view.json").write_text(self.manifest.model_dump_json(indent=1), encoding="utf-8")
        (folder / "transform.json").write_text(self.transform.model_dump_json(), encoding="utf-8")
        (folder / "tail.json").write_text(self.tail.model_dump_json(), encoding="utf-8")
        limit = _Limit(target_fpr=self.target_fpr, needs_effect=self.needs_effect)
        (folder / "limit.json").write_text(limit.model_dump_json(), encoding="utf-8")
        (folder / "card.json").write_text(json.dumps(self.card, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Detector:
        """Read what `save` wrote.

        Raises:
            StoreError: something is missing, damaged, or of another version of the view.
        """
        try:
            manifest = ViewManifest.model_validate_json((folder / "view.json").read_text(encoding="utf-8"))
            limit = _Limit.model_validate_json((folder / "limit.json").read_text(encoding="utf-8"))
            detector = cls(
                manifest,
                Transform.model_validate_json((folder / "transform.json").read_text(encoding="utf-8")),
                Model.load(folder / "model"),
                Tail.model_validate_json((folder / "tail.json").read_text(encoding="utf-8")),
                limit.target_fpr,
                limit.needs_effect,
                json.loads((folder / "card.json").read_text(encoding="utf-8")),
            )
        except (OSError, ValueError, ValidationError) as error:
            raise StoreError(f"{folder}: not a stored detector ({str(error).splitlines()[0]})") from error
        if (detector.transform.features, detector.model.features) != (manifest.features, len(manifest.features)):
            raise StoreError(f"{folder}: view, transform and model do not belong together; train it again")
        expected = paper.VERSION if manifest.name == paper.NAME else behaviour.VERSION
        if manifest.version != expected:
            raise StoreError(f"{folder}: view {manifest.name} {manifest.version}, this is {expected}; train it again")
        return detector


def effect(rows: pd.DataFrame, features: Sequence[Feature]) -> np.ndarray:
    """Bool [rows]: at least one feature is at its minimum effect; all True for a view that states none."""
    limits = {f.name: f.minimum_effect for f in features if f.minimum_effect is not None}
    if not limits:
        return np.ones(len(rows), bool)
    return np.asarray(np.any([rows[name].to_numpy() >= limit for name, limit in limits.items()], axis=0))


def worst(values: np.ndarray, flows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flow numbers (ascending) and the highest value of each."""
    unique, inverse = np.unique(flows, return_inverse=True)
    highest = np.full(len(unique), -np.inf)
    np.maximum.at(highest, inverse, values)
    return unique, highest


def fit(
    family: Family,
    params: Parameters,
    manifest: ViewManifest,
    fit_rows: pd.DataFrame,
    malicious: np.ndarray,
    exchange: np.ndarray,
    calibration_rows: pd.DataFrame,
    *,
    target_fpr: float,
    needs_effect: bool,
    seed: int,
) -> Detector:
    """Fit transform and model on the fit rows and set the limit on the calibration rows.

    Args:
        family: of the model.
        params: of the model.
        manifest: the view's.
        fit_rows: rows of the view, with `flow`.
        malicious: bool [fit rows].
        exchange: int64 [fit rows].
        calibration_rows: rows of benign flows that the model is not fitted on, with `flow`.
        target_fpr: share of benign flows that may be flagged.
        needs_effect: flag only flows with a minimum effect.
        seed: of models with chance in them.

    Raises:
        ProtocolError: a class is missing among the fit rows, or there is no calibration row.
    """
    if len(fit_rows) == 0 or len(calibration_rows) == 0:
        raise ProtocolError("no benign flows are left to fit on or to set the limit: give a longer recording")
    transform = Transform.fit(fit_rows, manifest.features, "linear" if manifest.name == paper.NAME else "log")
    harm = [feature.harm for feature in manifest.features]
    effects = EffectSizes(*transform.minimum_effects())
    model = fit_model(
        family, params, transform.apply(fit_rows), malicious, harm, seed, exchange=exchange, effects=effects
    )
    _, scores = worst(model.score(transform.apply(calibration_rows)), calibration_rows["flow"].to_numpy())
    return Detector(manifest, transform, model, Tail.fit(scores), target_fpr, needs_effect)
