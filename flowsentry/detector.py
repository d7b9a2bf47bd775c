"""The one path from flows to verdicts: transform, model, calibration and limit of one view, in one object.

Evaluation, batch inference and whatever serves a model call it: what is tested is what is served.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features import behaviour, kernel, paper
from flowsentry.features.build import statistics
from flowsentry.features.transform import Transform
from flowsentry.features.views import Feature, ViewManifest
from flowsentry.flows.columns import Columns
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.learning.effects import EffectSizes
from flowsentry.learning.families import Family
from flowsentry.learning.families import fit as fit_model
from flowsentry.learning.model import Model, Parameters
from flowsentry.reasons import Reason, Told, tell

CEILING: Final = 12.0
"""Highest surprise: the tail of a few thousand flows says nothing beyond it."""
TAIL_SHARE: Final = 0.01
"""Share of the calibration flows whose scores the exponential tail is fitted to."""
KNOTS: Final = 1000


@dataclass(frozen=True, eq=False)
class _Knots:
    """The knots of a tail as arrays."""

    scores: np.ndarray
    surprises: np.ndarray


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
        knots = self._knots.scores
        surprise = np.interp(scores, knots, self._knots.surprises, left=0.0)
        beyond = np.maximum(scores - knots[-1], 0)
        spread = max(self.excess, 1e-9)
        return np.asarray(np.minimum(surprise + beyond / spread / math.log(10), CEILING))

    @cached_property
    def _knots(self) -> _Knots:
        return _Knots(np.array(self.scores), np.array(self.surprises))


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

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides a verdict: all that `save` writes but the card."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save(folder)
            hashed = hashlib.sha256()
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "card.json"):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                hashed.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
        return hashed.hexdigest()

    def score(self, rows: pd.DataFrame | np.ndarray) -> np.ndarray:
        """Surprise of rows of the view, float64 [rows]; 0 where no feature reaches its minimum effect.

        Args:
            rows: the view's columns; for a view without categories also [rows, features] in the view's order.
        """
        surprise = np.zeros(len(rows))
        has_effect = self._effect(rows)
        if has_effect.any():
            surprise[has_effect] = self.tail.surprise(self.model.score(self._transformed(rows[has_effect])))
        return surprise

    def judge(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Score, and what the model's own decision says without limit and minimum effect, as the study did.

        Returns:
            float64 [rows] as `score`, and bool [rows].
        """
        raw = self.model.score(self._transformed(rows))
        return np.where(self._effect(rows), self.tail.surprise(raw), 0.0), raw > self.model.boundary

    def watch(self, stream: kernel.Stream | None = None) -> Watch:
        """Set the detector to work on a stream: a new one, or one that goes on."""
        return Watch(self, stream or kernel.Stream())

    def verdicts(self, reports: pd.DataFrame, *, explained: bool = True) -> pd.DataFrame:
        """Judge whole recordings of raw reports.

        Args:
            reports: canonical reports; each recording is a stream of its own, in arrival order.
            explained: with reasons, which take most of the time where many flows are malicious.

        Returns:
            One row per report, with the index of `reports`: `flow` (number, unique over recordings), `anomaly_score`,
            `threshold`, `label`, `warm`, `first_alarm` (missing without), and of malicious ones `anomaly_type`,
            `baseline_window` and `reasons`. The verdict of a flow is that of its last report.
        """
        parts, following = [], 0
        for _, part in reports.groupby("recording", observed=True, sort=False):
            judged = self.watch().take(Columns.of(part))
            parts.append(judged.table(explained=explained).set_index(part.index).assign(flow=judged.flow + following))
            following += int(judged.flow.max()) + 1
        return pd.concat(parts).reindex(reports.index) if parts else _no_verdicts()

    def with_card(self, card: dict[str, Any]) -> Detector:
        return replace(self, card=card)

    def _effect(self, rows: pd.DataFrame | np.ndarray) -> np.ndarray:
        if not self.needs_effect:
            return np.ones(len(rows), bool)
        if isinstance(rows, pd.DataFrame):
            return effect(rows, self.manifest.features)
        places, limits = self._effect_limits
        return np.asarray((rows[:, places] >= limits).any(axis=1)) if len(places) else np.ones(len(rows), bool)

    @cached_property
    def _effect_limits(self) -> tuple[np.ndarray, np.ndarray]:
        stated = [(i, f.minimum_effect) for i, f in enumerate(self.manifest.features) if f.minimum_effect is not None]
        return np.array([i for i, _ in stated], np.int64), np.array([limit for _, limit in stated], np.float32)

    def _transformed(self, rows: pd.DataFrame | np.ndarray) -> np.ndarray:
        return self.transform.apply(rows) if isinstance(rows, pd.DataFrame) else self.transform.apply_values(rows)

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


@dataclass(frozen=True)
class Judged:
    """What a detector says of some reports of a stream; first dimension [reports]."""

    detector: Detector
    flow: np.ndarray
    """int64: number of the flow in its stream, from 0."""
    score: np.ndarray
    """float64: the flow's worst so far; in the view `paper`, which judges a flow by its last report, this report's."""
    malicious: np.ndarray
    """bool."""
    first_alarm: np.ndarray
    """int64: the stream's clock at the flow's first alarm, ms since 1970; 0 without."""
    warm: np.ndarray
    """bool: the stream's baseline is past its warm-up."""
    rows: np.ndarray | pd.DataFrame
    """The view's values of every report."""

    def __len__(self) -> int:
        return len(self.flow)

    def reasons(self, positions: np.ndarray) -> list[list[Reason]]:
        """Why the reports at these positions are malicious: for each the strongest reasons, best first.

        A flow that became malicious in an earlier report is explained by what this one still shows.
        """
        return list(self.told(positions).reasons())

    def told(self, positions: np.ndarray) -> Told:
        """`reasons` as arrays."""
        rows = self.rows.iloc[positions] if isinstance(self.rows, pd.DataFrame) else self.rows[positions]
        return tell(self.detector, rows)

    def table(self, *, explained: bool = True) -> pd.DataFrame:
        """The columns of `Detector.verdicts`; without reasons those that need them are empty."""
        count = len(self)
        alarms = np.flatnonzero(self.malicious & explained)
        reasons: list[list[Reason] | None] = [None] * count
        kinds: list[str | None] = [None] * count
        windows: list[str | None] = [None] * count
        told = self.told(alarms)
        leading = [told.features[j] for j in told.leading().tolist()]
        for place, found, feature in zip(alarms.tolist(), told.reasons(), leading, strict=True):
            reasons[place], kinds[place], windows[place] = found, feature.anomaly, feature.window
        alarm = np.where(self.first_alarm > 0, self.first_alarm, np.iinfo(np.int64).min)
        return pd.DataFrame(
            {
                "flow": self.flow,
                "anomaly_score": self.score,
                "threshold": self.detector.limit,
                "label": np.where(self.malicious, MALICIOUS, BENIGN),
                "warm": self.warm,
                "first_alarm": pd.DatetimeIndex(alarm.view("datetime64[ms]")).tz_localize("UTC"),
                "anomaly_type": pd.Series(kinds, dtype=object),
                "baseline_window": pd.Series(windows, dtype=object),
                "reasons": pd.Series(reasons, dtype=object),
            }
        )


class Watch:
    """A detector at work on one stream: takes reports in as they arrive and judges each at once."""

    def __init__(self, detector: Detector, stream: kernel.Stream) -> None:
        self.detector = detector
        self.stream = stream

    @property
    def warm(self) -> bool:
        """Whether the stream's baseline is past its warm-up; a view without one is always warm."""
        return self.stream.warm or self.detector.manifest.warm_up_seconds == 0

    @property
    def nbytes(self) -> int:
        """Memory of the stream, bytes."""
        return self.stream.nbytes

    def take(self, reports: Columns) -> Judged:
        """Judge the next reports, in arrival order; how they are cut into calls changes no verdict."""
        detector, limit = self.detector, self.detector.limit
        if detector.manifest.name == paper.NAME:
            advanced = self.stream.advance(reports)
            rows = paper.compute(reports.table())
            score = detector.score(rows)
            malicious = score >= limit
            alarm = np.where(malicious, advanced.clock, 0)
            return Judged(detector, advanced.flow, score, malicious, alarm, np.ones(len(score), bool), rows)
        advanced = self.stream.advance(reports, detector.score, limit)
        worst = advanced.worst
        return Judged(
            detector, advanced.flow, worst, worst >= limit, advanced.first_alarm, advanced.warm, advanced.features
        )

    def snapshot(self) -> kernel.Snapshot:
        """A copy of the stream for a checkpoint, to be written while the watch goes on."""
        return self.stream.snapshot(self.detector.digest)

    @classmethod
    def load(cls, detector: Detector, content: bytes) -> Watch:
        """Go on from a checkpoint; flows keep their worst score only if the same detector gave it.

        Raises:
            StoreError: the content is damaged or of another version of the kernel.
        """
        return cls(detector, kernel.Stream.load(content, detector.digest))


def _no_verdicts() -> pd.DataFrame:
    columns = ("flow", "anomaly_score", "threshold", "label", "warm", "first_alarm")
    return pd.DataFrame(columns=[*columns, "anomaly_type", "baseline_window", "reasons"])


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
    # What is ordinary is what benign flows do: reasons quote it.
    benign = statistics(fit_rows[~malicious], manifest.features)
    manifest = manifest.model_copy(update={"statistics": benign})
    return Detector(manifest, transform, model, Tail.fit(scores), target_fpr, needs_effect)
