"""The quality gate: may a challenger take the champion's place, by flows that neither of them has learned from.

The flows are the challenger's untouched validation part without every exchange that the champion was fitted or
calibrated on; training records those flows as an `Exposure`. Without a champion, or with too few such flows, the
challenger is held to absolute bars, and the decision says so. A champion that cannot be compared fails the gate, unless
the settings ask for the absolute bars. Every rule that was applied is a line of the decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from flowsentry.config import QualityGateSettings
from flowsentry.errors import StoreError
from flowsentry.features.splits import Splits
from flowsentry.flows.hashing import compiled, hash_text, mix
from flowsentry.flows.schema import BENIGN, is_malicious
from flowsentry.learning.baselines import FittedBaseline
from flowsentry.learning.selection import Metric
from flowsentry.reporting.evaluation import LABEL_COLUMNS, UNNAMED
from flowsentry.reporting.metrics import Bools, Counts, Floats, Frozen, Ints, count
from flowsentry.reporting.results import Labels

FOLD: Final = "random"
"""The fold whose fit ships."""
LEARNED_FROM: Final = ("fit", "calibration")
CONFIDENCE: Final = 0.95
_FILE: Final = "exposure.npy"
_ROUNDING: Final = 1e-9
"""19 of 20 flows are not more than 5% below 20 of 20, whatever the binary fractions say."""

Outcome = Literal["passed", "failed", "not decided"]


class Rule(Frozen):
    """One rule of a gate and what came of it; a gate passes if none failed."""

    name: str
    outcome: Outcome
    words: str
    figures: dict[str, float | None]


class Figure(Frozen):
    """A figure with its 95% interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class FamilyFigure(Frozen):
    """Recall of one family."""

    flows: int
    recall: Figure


class Scores(Frozen):
    """What a model achieves on the judged flows."""

    version: str
    metric: Figure
    fpr: Figure
    families: dict[str, FamilyFigure]
    counts: Counts


class Difference(Frozen):
    """Challenger minus champion, paired."""

    metric: Figure
    fpr: Figure
    families: dict[str, Figure]


class BaselineScores(Frozen):
    """What a baseline achieves on the judged flows."""

    name: str
    title: str
    uses_identity: bool
    metric: float | None
    fpr: float | None


class QualityDecision(Frozen):
    """Whether a challenger is good enough, and why."""

    passed: bool
    reason: str
    basis: Literal["champion", "absolute bars"]
    basis_reason: str
    champion_digest: str | None
    """Of the bundle in production as the challenger was judged, which may replace no other; None: nothing was."""
    metric: Metric
    labels: Labels
    benign: int
    malicious: int
    """Judged flows by class."""
    validation: int
    """Labelled flows of the challenger's validation part."""
    seen_by_champion: int | None
    """Of those, flows left out of a comparison because the champion has learned from their exchange; None: unknown."""
    challenger: Scores
    champion: Scores | None
    difference: Difference | None
    baselines: tuple[BaselineScores, ...]
    rules: tuple[Rule, ...]
    settings: QualityGateSettings


@dataclass(frozen=True)
class Exposure:
    """The flows that a detector was fitted or calibrated on, to be known again in any later recording."""

    flows: np.ndarray
    """Fingerprints, uint64 [n], ascending, each once."""

    def save(self, folder: Path) -> None:
        """Write `exposure.npy` into an existing folder; no pickle."""
        np.save(folder / _FILE, self.flows, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Exposure:
        """Read what `save` wrote.

        Raises:
            StoreError: it is missing or damaged.
        """
        try:
            flows = np.load(folder / _FILE, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{folder / _FILE}: cannot be read ({type(error).__name__}); train again") from error
        if flows.dtype != np.uint64 or flows.ndim != 1 or (flows[1:] <= flows[:-1]).any():
            raise StoreError(f"{folder / _FILE}: holds no fingerprints in ascending order; train again")
        return cls(flows)


@dataclass(frozen=True)
class Scored:
    """What a detector says of every flow of a flow table."""

    version: str
    score: Floats
    """Worst of each flow, [flows]."""
    flagged: Bools


@dataclass(frozen=True)
class Unscored:
    """A champion that cannot be scored here."""

    version: str
    reason: str
    """With what to do about it."""


def fingerprints(flows: pd.DataFrame) -> np.ndarray:
    """What a flow is by its content, whatever the file was called: uint64 [flows].

    Of flow id, addresses, ports, transport, bytes and the time of the last report (microseconds).
    """
    keys = hash_text(flows["flow_id"])
    texts = [hash_text(flows[name]) for name in ("src_ip", "dst_ip", "transport")]
    ports = [flows[name].fillna(-1).to_numpy(np.int64) for name in ("src_port", "dst_port")]
    time = flows["time"].dt.as_unit("us").astype("int64").to_numpy(np.int64)
    for part in (*texts, *ports, time, flows["bytes"].to_numpy(np.int64)):
        keys = _mixed(keys, part.astype(np.uint64))
    return keys


def exposure(flows: pd.DataFrame, splits: Splits) -> Exposure:
    """Which flows the fit that ships learned from: those of `fit` and `calibration` of the fold `random`.

    Args:
        flows: flow table, one row per flow.
        splits: of the same flows.

    Raises:
        ValueError: the splits are of other flows.
    """
    if not splits.parts.index.equals(flows.index):
        raise ValueError("the splits are of other flows: their index differs from the flow table's")
    learned = splits.parts[FOLD].isin(LEARNED_FROM).to_numpy(bool)
    return Exposure(np.unique(fingerprints(flows[learned])))


def seen(flows: pd.DataFrame, exposure: Exposure) -> Bools:
    """Bool [flows]: a detector with this exposure has learned from the flow or from another of its exchange.

    Args:
        flows: flow table with `exchange`.
        exposure: of the detector.
    """
    keys = fingerprints(flows)
    place = np.searchsorted(exposure.flows, keys)
    known = np.zeros(len(flows), bool)
    inside = place < len(exposure.flows)
    known[inside] = exposure.flows[place[inside]] == keys[inside]
    exchange, names = pd.factorize(flows["exchange"])
    return np.asarray(np.bincount(exchange[known], minlength=len(names))[exchange] > 0, bool)


def by_flow(verdicts: pd.DataFrame, flows: pd.DataFrame, version: str) -> Scored:
    """Reduce verdicts on reports to flows: a flow's verdict is that of its last report, the worst so far.

    Args:
        verdicts: of `Detector.verdicts`: flow, anomaly_score, label; in arrival order.
        flows: flow table, index flow number.
        version: of the model.

    Raises:
        ValueError: a flow has no verdict.
    """
    last = verdicts[["flow", "anomaly_score", "label"]].drop_duplicates("flow", keep="last").set_index("flow")
    missing = int((~flows.index.isin(last.index)).sum())
    if missing:
        raise ValueError(f"{missing:,} flows have no verdict: the reports are not those of the flow table")
    last = last.reindex(flows.index)
    return Scored(version, last["anomaly_score"].to_numpy(np.float64), is_malicious(last["label"]))


def truth(flows: pd.DataFrame, labels: Labels) -> tuple[Bools, Bools, np.ndarray]:
    """Labelled, malicious (bool [flows]), and the family of malicious flows (text or None, object [flows])."""
    given = flows[LABEL_COLUMNS[labels]]
    malicious = is_malicious(given)
    known = malicious | given.eq(BENIGN).fillna(False).to_numpy(bool)
    named = flows["family"].astype(object) if "family" in flows else pd.Series(None, index=flows.index, dtype=object)
    family = named.where(named.notna(), UNNAMED).to_numpy(object, copy=True)
    family[~malicious] = None
    return known, malicious, family


def judge(
    flows: pd.DataFrame,
    validation: Ints,
    *,
    challenger: Scored,
    champion: Scored | Unscored | None,
    champion_digest: str | None = None,
    seen: Bools | None,
    baselines: Mapping[str, tuple[FittedBaseline, pd.DataFrame]],
    labels: Labels,
    settings: QualityGateSettings,
    seed: int = 0,
) -> QualityDecision:
    """Decide whether a challenger is good enough to be tried as a service.

    Intervals are of a paired bootstrap over exchanges (Efron 1979; whole clusters as in Field and Welsh 2007): flows
    of one conversation are right or wrong together. Exchanges with equal counts are drawn at once, which is the same.

    Args:
        flows: flow table with truth, `exchange` and, where known, `family`.
        validation: flow numbers of the challenger's validation part.
        challenger: its scores of all flows.
        champion: the champion's, or why there are none; None: there is no champion.
        champion_digest: of its bundle; None: it is not deployed, only stored as the version in production.
        seen: bool [flows], what the champion has learned from; None: not known.
        baselines: fitted baselines with their scores, as `candidates.judge_baselines` gives them; the fold `random`
            counts.
        labels: the label set that counts.
        settings: metric, bars and tolerances.
        seed: of the bootstrap.

    Raises:
        ValueError: scores are not of these flows.
    """
    known, malicious, family = truth(flows, labels)
    part = flows.index.isin(validation)
    if int(part.sum()) != len(validation):
        raise ValueError("the validation part has flows that the flow table does not have")
    whole = part & known
    outcome, basis_reason, shared = _basis(champion, champion_digest, seen, whole, malicious, settings)
    judged = np.flatnonzero(shared if shared is not None else whole)
    compared = champion if isinstance(champion, Scored) and shared is not None else None
    rows = _Rows(flows, judged, malicious[judged], family[judged], settings, seed)
    mine, theirs, difference = rows.compare(challenger, compared)
    beside = tuple(_baseline(name, given, rows, flows) for name, given in baselines.items())
    rules = [_classes(rows)]
    if compared is None or theirs is None or difference is None:
        rules.append(Rule(name="champion", outcome=outcome, words=basis_reason, figures={}))
        rules.append(_metric_bar(mine, settings))
        rules += [_family_told(name, of_family) for name, of_family in mine.families.items()]
        rules.append(_fpr_bar(mine, settings))
    else:
        rules.append(_not_worse(mine, theirs, difference, settings))
        rules += [_family_rule(name, mine, theirs, difference, settings) for name in mine.families]
        rules.append(_fpr_bar(mine, settings))
        rules.append(_fpr_not_worse(mine, theirs, difference))
    rules += [_beats(mine, one, settings) for one in beside if not one.uses_identity]
    failed = [rule for rule in rules if rule.outcome == "failed"]
    return QualityDecision(
        passed=not failed,
        reason="; ".join(f"{rule.name}: {rule.words}" for rule in failed) or f"good enough: {basis_reason}",
        basis="absolute bars" if compared is None else "champion",
        basis_reason=basis_reason,
        champion_digest=champion_digest,
        metric=settings.metric,
        labels=labels,
        benign=int((~rows.malicious).sum()),
        malicious=int(rows.malicious.sum()),
        validation=int(whole.sum()),
        seen_by_champion=None if seen is None else int((whole & seen).sum()),
        challenger=mine,
        champion=theirs,
        difference=difference,
        baselines=beside,
        rules=tuple(rules),
        settings=settings,
    )


@compiled
def _mixed(keys: np.ndarray, more: np.ndarray) -> np.ndarray:
    result = np.empty_like(keys)
    for i in range(len(keys)):
        result[i] = mix(keys[i], more[i])
    return result


def _basis(
    champion: Scored | Unscored | None,
    champion_digest: str | None,
    seen: Bools | None,
    whole: Bools,
    malicious: Bools,
    settings: QualityGateSettings,
) -> tuple[Outcome, str, Bools | None]:
    """Whether a comparison is possible, what the challenger is held to, and the flows of the comparison."""
    bars = "the challenger is held to the absolute bars"
    if champion is None:
        return "not decided", f"there is no champion yet; {bars}", None
    name = f"the champion {champion.version}"
    if champion_digest is None:
        name = f"version {champion.version}, at stage production in ZenML although nothing is deployed"
    if isinstance(champion, Unscored) or seen is None:
        why = champion.reason if isinstance(champion, Unscored) else "what it has learned from is not recorded"
        words = f"{name} cannot be compared: {why}"
        if settings.without_champion:
            return "not decided", f"{words}; {bars} alone, as quality_gate.without_champion asks", None
        way_out = "quality_gate.without_champion: true would hold the challenger to the absolute bars alone"
        return "failed", f"{words}; {way_out}", None
    shared = whole & ~seen
    benign, attacks = int((shared & ~malicious).sum()), int((shared & malicious).sum())
    numbers = f"{benign:,} benign and {attacks:,} malicious validation flows are new to both models"
    if min(benign, attacks) < settings.min_flows:
        return "not decided", f"only {numbers}, fewer than {settings.min_flows:,} of a class; {bars}", None
    return "passed", f"compared with {name}: {numbers}", shared


class _Rows:
    """The judged flows; figures on them and on resamples of their exchanges."""

    def __init__(
        self,
        flows: pd.DataFrame,
        judged: Ints,
        malicious: Bools,
        family: np.ndarray,
        settings: QualityGateSettings,
        seed: int,
    ) -> None:
        self.position = judged
        self.malicious = malicious
        codes, names = pd.factorize(pd.Series(family, dtype=object), sort=True)
        self.family, self.families = codes, [str(name) for name in names]
        self.exchange, exchanges = pd.factorize(flows["exchange"].to_numpy()[judged])
        self.exchanges = len(exchanges)
        self.metric: Metric = settings.metric
        self.resamples = settings.resamples
        self.seed = seed

    def compare(self, challenger: Scored, champion: Scored | None) -> tuple[Scores, Scores | None, Difference | None]:
        """Figures of one or both models, and what the first has over the second."""
        one = self._counts(challenger)
        other = one if champion is None else self._counts(champion)
        totals = np.concatenate([one, other], axis=1)
        drawn = self._draw(totals)
        width = one.shape[1]
        mine = self._measure(totals.sum(axis=0)[:width], drawn[:, :width])
        scores = self._scores(challenger, *mine)
        if champion is None:
            return scores, None, None
        theirs = self._measure(totals.sum(axis=0)[width:], drawn[:, width:])
        points, spread = mine[0] - theirs[0], mine[1] - theirs[1]
        figures = [_figure(points[k], spread[:, k]) for k in range(len(points))]
        difference = Difference(
            metric=figures[0], fpr=figures[1], families=dict(zip(self.families, figures[2:], strict=True))
        )
        return scores, self._scores(champion, *theirs), difference

    def point(self, flagged: Bools) -> tuple[float | None, float | None]:
        """Metric and FPR of any decision, bool [judged]."""
        counts = count(self.malicious, flagged)
        whole = np.array([[counts.tp + counts.fn, counts.tp, counts.fp + counts.tn, counts.fp]], np.int64)
        return _number(_value(self.metric, *whole.T)[0]), _number(_value("fpr", *whole.T)[0])

    def _counts(self, scored: Scored) -> Ints:
        """By exchange: malicious, found, benign, alarms, then flows and found of each family; [exchanges, 4 + 2f]."""
        flagged = scored.flagged[self.position]
        kinds = [self.malicious, self.malicious & flagged, ~self.malicious, ~self.malicious & flagged]
        for code in range(len(self.families)):
            mine = self.family == code
            kinds += [mine, mine & flagged]
        columns = [np.bincount(self.exchange[kind], minlength=self.exchanges) for kind in kinds]
        return np.stack(columns, axis=1).astype(np.int64)

    def _draw(self, totals: Ints) -> Ints:
        """Sums over as many exchanges as there are, drawn with replacement; [resamples, columns]."""
        if not len(totals):
            return np.zeros((self.resamples, totals.shape[1]), np.int64)
        patterns, times = np.unique(totals, axis=0, return_counts=True)
        draw = np.random.default_rng(self.seed)
        drawn = draw.multinomial(len(totals), times / len(totals), size=self.resamples)
        return np.asarray(drawn @ patterns, np.int64)

    def _measure(self, totals: Ints, drawn: Ints) -> tuple[Floats, Floats]:
        """Metric, FPR and recall of each family: on the flows [2 + f], and on the resamples [resamples, 2 + f]."""
        result = []
        for sums in (totals[None, :], drawn):
            malicious, found, benign, alarms = (sums[:, k] for k in range(4))
            columns = [_value(name, malicious, found, benign, alarms) for name in (self.metric, "fpr")]
            columns += [_ratio(sums[:, k + 1], sums[:, k]) for k in range(4, sums.shape[1], 2)]
            result.append(np.stack(columns, axis=1))
        return result[0][0], result[1]

    def _scores(self, scored: Scored, points: Floats, spread: Floats) -> Scores:
        figures = [_figure(points[k], spread[:, k]) for k in range(len(points))]
        families = {
            name: FamilyFigure(flows=int((self.family == code).sum()), recall=figures[2 + code])
            for code, name in enumerate(self.families)
        }
        counts = count(self.malicious, scored.flagged[self.position])
        return Scores(version=scored.version, metric=figures[0], fpr=figures[1], families=families, counts=counts)


def _ratio(part: Ints, whole: Ints) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0))


def _value(name: str, malicious: Ints, found: Ints, benign: Ints, alarms: Ints) -> Floats:
    """A rate from counts, arrays [n]; NaN where it is undefined. The same as of `metrics.rates`."""
    recall, fpr = _ratio(found, malicious), _ratio(alarms, benign)
    match name:
        case "recall":
            return recall
        case "fpr":
            return fpr
        case "balanced_accuracy":
            return (recall + 1 - fpr) / 2
        case "accuracy":
            return _ratio(found + benign - alarms, malicious + benign)
        case "f1":
            return np.asarray(np.where(malicious > 0, _ratio(2 * found, found + alarms + malicious), np.nan))
    raise ValueError(f"there is no metric {name}")


def _figure(value: float, spread: Floats) -> Figure:
    defined = spread[~np.isnan(spread)]
    if np.isnan(value) or not defined.size:
        return Figure(value=_number(value), low=None, high=None)
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [outside, 1 - outside])
    return Figure(value=float(value), low=float(low), high=float(high))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _baseline(
    name: str, given: tuple[FittedBaseline, pd.DataFrame], rows: _Rows, flows: pd.DataFrame
) -> BaselineScores:
    fitted, table = given
    mine = table[table["fold"].astype(str).eq(FOLD)].set_index("flow")
    wanted = flows.index[rows.position]
    if not wanted.isin(mine.index).all():
        raise ValueError(f"the baseline {name} has no scores for some validation flows")
    metric, fpr = rows.point(mine.loc[wanted, "flagged"].to_numpy(bool))
    return BaselineScores(name=name, title=fitted.title, uses_identity=fitted.uses_identity, metric=metric, fpr=fpr)


def _classes(rows: _Rows) -> Rule:
    malicious = int(rows.malicious.sum())
    benign = len(rows.malicious) - malicious
    missing = [name for name, flows in (("benign", benign), ("malicious", malicious)) if not flows]
    words = f"{benign:,} benign and {malicious:,} malicious flows"
    if missing:
        words += f": nothing can be said without {' and '.join(missing)} flows; give longer recordings"
    return Rule(
        name="both classes",
        outcome="failed" if missing else "passed",
        words=words,
        figures={"benign": benign, "malicious": malicious},
    )


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def _metric_bar(mine: Scores, settings: QualityGateSettings) -> Rule:
    value = mine.metric.value
    return Rule(
        name=f"{_name(settings.metric)} bar",
        outcome="passed" if value is not None and value >= settings.min_metric else "failed",
        words=f"{_name(settings.metric)} {_told(mine.metric)}, at least {settings.min_metric:g} wanted",
        figures={**_figures("challenger", mine.metric), "bar": settings.min_metric},
    )


def _fpr_bar(mine: Scores, settings: QualityGateSettings) -> Rule:
    value = mine.fpr.value
    return Rule(
        name="FPR bar",
        outcome="passed" if value is not None and value <= settings.max_fpr else "failed",
        words=f"FPR {_told(mine.fpr)}, at most {settings.max_fpr:g} allowed",
        figures={**_figures("challenger", mine.fpr), "bar": settings.max_fpr},
    )


def _not_worse(mine: Scores, theirs: Scores, difference: Difference, settings: QualityGateSettings) -> Rule:
    return Rule(
        name=f"{_name(settings.metric)} not worse",
        outcome=_loses(difference.metric, settings.max_loss),
        words=_against(
            _name(settings.metric), mine.metric, theirs.metric, difference.metric, settings.max_loss, "max_loss"
        ),
        figures=_compared(mine.metric, theirs.metric, difference.metric),
    )


def _family_rule(
    name: str, mine: Scores, theirs: Scores, difference: Difference, settings: QualityGateSettings
) -> Rule:
    flows, recall = mine.families[name].flows, mine.families[name].recall
    other, gain = theirs.families[name].recall, difference.families[name]
    outcome = _loses(gain, settings.max_family_loss)
    words = _against("recall", recall, other, gain, settings.max_family_loss, "max_family_loss")
    if flows < settings.min_family_flows:
        outcome = "not decided"
        words = _difference("recall", recall, other, gain)
        words += f"; not decided: {flows:,} flows are fewer than {settings.min_family_flows:,}"
    return Rule(
        name=f"family {name} not worse",
        outcome=outcome,
        words=words,
        figures={**_compared(recall, other, gain), "flows": flows},
    )


def _family_told(name: str, family: FamilyFigure) -> Rule:
    """What is found of a family where there is nothing to compare with."""
    return Rule(
        name=f"family {name}",
        outcome="not decided",
        words=f"recall {_told(family.recall)} of {family.flows:,} flows, with nothing to compare with",
        figures={**_figures("challenger", family.recall), "flows": family.flows},
    )


def _fpr_not_worse(mine: Scores, theirs: Scores, difference: Difference) -> Rule:
    low = difference.fpr.low
    return Rule(
        name="FPR not worse",
        outcome="passed" if low is not None and low <= 0 else "failed",
        words=f"FPR {_told(mine.fpr)} against {_told(theirs.fpr)}: difference {_told(difference.fpr, sign=True)}, "
        "an interval above 0 is not allowed",
        figures=_compared(mine.fpr, theirs.fpr, difference.fpr),
    )


def _beats(mine: Scores, baseline: BaselineScores, settings: QualityGateSettings) -> Rule:
    metric, figures = _name(settings.metric), {"challenger": mine.metric.value, "baseline": baseline.metric}
    words = f"{metric} {_text(mine.metric.value)} against {_text(baseline.metric)}"
    outcome: Outcome
    if settings.metric == "recall" and (baseline.fpr is None or baseline.fpr > settings.max_fpr):
        outcome = "not decided"
        words += f"; it takes no part: its FPR {_text(baseline.fpr)} is above {settings.max_fpr:g}"
    else:
        worse = mine.metric.value is None or (baseline.metric is not None and mine.metric.value <= baseline.metric)
        outcome = "failed" if worse else "passed"
    return Rule(name=f"better than {baseline.title}", outcome=outcome, words=words, figures=figures)


def _loses(difference: Figure, most: float) -> Outcome:
    if difference.value is None or difference.high is None:
        return "failed"
    return "failed" if difference.value < -most - _ROUNDING or difference.high < 0 else "passed"


def _against(what: str, mine: Figure, theirs: Figure, difference: Figure, most: float, key: str) -> str:
    words = f"{_difference(what, mine, theirs, difference)}, at most {most:g} lower is allowed, "
    words += "but not an interval below 0"
    if difference.high is not None and difference.high >= 0 and _loses(difference, most) == "failed":
        words += (
            "; the interval reaches 0, so these are too few flows to tell a loss from chance: "
            f"give more data, or a wider quality_gate.{key}"
        )
    return words


def _difference(what: str, mine: Figure, theirs: Figure, difference: Figure) -> str:
    return f"{what} {_told(mine)} against {_told(theirs)}: difference {_told(difference, sign=True)}"


def _compared(mine: Figure, theirs: Figure, difference: Figure) -> dict[str, float | None]:
    return {**_figures("challenger", mine), **_figures("champion", theirs), **_figures("difference", difference)}


def _figures(name: str, figure: Figure) -> dict[str, float | None]:
    return {name: figure.value, f"{name} low": figure.low, f"{name} high": figure.high}


def _told(figure: Figure, *, sign: bool = False) -> str:
    """`0.9912 (0.9850 to 0.9960)`."""
    if figure.low is None or figure.high is None:
        return _text(figure.value, sign=sign)
    return f"{_text(figure.value, sign=sign)} ({_text(figure.low, sign=sign)} to {_text(figure.high, sign=sign)})"


def _text(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "undefined"
    return f"{value:+.4f}" if sign else f"{value:.4f}"
