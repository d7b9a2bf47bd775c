"""What a replay shows: running scores, and findings in plain words. Pure computations of the live page.

A flow counts once, by its latest verdict: a later report may raise it. Beside every score stands what a model that
always gives the same answer would have reached on the same flows. The original study's chart had right and wrong
answers alone, and a model that answered "benign" to everything looked 90% right on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, betaincinv

from flowsentry.flows.labels import GENERIC_FAMILY
from flowsentry.flows.schema import BENIGN, MALICIOUS

WINDOW: Final = 500
"""Reports, or requests, that "recently" looks back on."""
MOST_POINTS: Final = 600
MOST_FAMILIES: Final = 20
OTHERS: Final = "other families"

ENOUGH: Final = 10
"""Attacks without one alarm, or flows of a family without one, that are no bad luck any more."""
ENOUGH_BENIGN: Final = 20
CERTAIN: Final = 0.001
"""Probability below which a difference is not chance."""
CARD_BOUND: Final = 0.01
"""The card's own rates come from few flows: they are taken at this one-sided bound (Clopper and Pearson 1934)."""
FAR: Final = 3.0
"""Alarms per attack, or attacks per alarm, beyond which a model is skewed."""
WORSE_BY: Final = 0.05
"""Recall below the card's by less is not told."""
FAR_WORSE: Final = 0.5
"""Share of the card's recall below which a family is as good as lost. What is worse but above it is a note: flows of
one attack are found or missed together, so the bounds, made for independent flows, are narrow."""
MANY_FALSE_ALARMS: Final = 0.01
"""FPR above the card's is a note below this: 1,000 alarms a day from 100,000 benign flows."""
SLOW_MS: Final = 250.0
SILENT_SECONDS: Final = 30.0

_BENIGN, _UNLABELLED, _FIRST_FAMILY = 0, 1, 2
_BINS: Final = np.geomspace(0.01, 1e6, 400)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Standing:
    """Flows by what they are and what they were called, and the rates of that. A rate without flows is None."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def flows(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def malicious(self) -> int:
        return self.tp + self.fn

    @property
    def benign(self) -> int:
        return self.fp + self.tn

    @property
    def alarms(self) -> int:
        return self.tp + self.fp

    @property
    def right(self) -> int:
        return self.tp + self.tn

    @property
    def wrong(self) -> int:
        return self.fp + self.fn

    @property
    def accuracy(self) -> float | None:
        return _ratio(self.right, self.flows)

    @property
    def recall(self) -> float | None:
        return _ratio(self.tp, self.malicious)

    @property
    def precision(self) -> float | None:
        return _ratio(self.tp, self.alarms)

    @property
    def fpr(self) -> float | None:
        return _ratio(self.fp, self.benign)

    @property
    def balanced_accuracy(self) -> float | None:
        if self.recall is None or self.fpr is None:
            return None
        return (self.recall + 1 - self.fpr) / 2

    def always(self, label: str) -> Standing:
        """What a model that always gives this label reaches on the same flows."""
        if label == MALICIOUS:
            return Standing(tp=self.malicious, fp=self.benign, tn=0, fn=0)
        return Standing(tp=0, fp=0, tn=self.benign, fn=self.malicious)


@dataclass(frozen=True)
class Share:
    """How many of some flows were flagged."""

    flows: int
    flagged: int

    @property
    def rate(self) -> float | None:
        return _ratio(self.flagged, self.flows)


@dataclass(frozen=True)
class Card:
    """What the champion's card promises of untouched validation flows."""

    families: Mapping[str, Share]
    benign: Share


@dataclass(frozen=True)
class Progress:
    """Where a replay is."""

    total: int
    """Reports to send."""
    finished: bool
    silent_seconds: float
    """Since the last answer."""


@dataclass(frozen=True)
class Finding:
    """Something a reader must not overlook."""

    code: Literal["constant", "skewed", "worse", "slow", "lost", "stopped", "untested"]
    severity: Literal["bad", "note"]
    text: str


@dataclass(frozen=True)
class _Point:
    rows: int
    counts: Ints
    recent: Ints
    latency: tuple[float, float]


class Tally:
    """Running scores of a journal, fed with its rows in order, in portions of any size.

    Memory: a few bytes a flow, and `MOST_POINTS` points of the past, whatever the length of the replay.
    """

    def __init__(self) -> None:
        self.rows = 0
        """Reports answered, rejected ones included."""
        self.rejected = 0
        self.cold = 0
        """Flows that were first judged before the stream's baseline was warm."""
        self.requests = 0
        self.position = -1
        """Of the last row taken."""
        self.first_sent: pd.Timestamp | None = None
        self.last_sent: pd.Timestamp | None = None
        self._families: list[str] = []
        self._verdict = np.full(1024, -1, np.int8)
        self._warm = np.zeros(1024, bool)
        self._counts = np.zeros((_FIRST_FAMILY, 2), np.int64)
        self._warm_counts = np.zeros((_FIRST_FAMILY, 2), np.int64)
        self._last_rows = np.empty((0, 3), np.int64)
        self._latencies = np.empty(0)
        self._histogram = np.zeros(len(_BINS) + 1, np.int64)
        self._last_request = -1
        self._stride = 1
        self._points: list[_Point] = []

    @property
    def families(self) -> list[str]:
        """Families of malicious flows, in order of appearance."""
        return list(self._families)

    @property
    def standing(self) -> Standing:
        """Of all labelled flows so far."""
        return _standing(self._counts)

    @property
    def warm_standing(self) -> Standing:
        """Of those that were first judged with a warm baseline."""
        return _standing(self._warm_counts)

    @property
    def unlabelled(self) -> Share:
        """Flows whose truth nobody knows."""
        return _share(self._counts[_UNLABELLED])

    @property
    def flows(self) -> int:
        """Flows with a verdict."""
        return int(self._counts[:, 0].sum())

    def family(self, name: str, *, warm: bool = False) -> Share:
        """Flows of a family, or those of them that were first judged with a warm baseline."""
        counts = self._warm_counts if warm else self._counts
        return _share(counts[_FIRST_FAMILY + self._families.index(name)])

    def latency(self, share: float) -> float | None:
        """Quantile of the requests' latency, ms, within 5%; None without requests."""
        if not self.requests:
            return None
        reached = np.searchsorted(np.cumsum(self._histogram), math.ceil(share * self.requests))
        return float(_BINS[min(int(reached), len(_BINS) - 1)])

    def take(self, rows: pd.DataFrame) -> None:
        """Go on with the next rows of the journal (columns `NARROW` or more)."""
        if rows.empty:
            return
        self.position = int(rows["position"].iloc[-1])
        self.first_sent = self.first_sent or rows["sent"].iloc[0]
        self.last_sent = rows["sent"].iloc[-1]
        flow, latency = rows["flow"].to_numpy(np.int64), rows["latency_ms"].to_numpy(np.float64)
        judged = rows["verdict"].notna().to_numpy(bool)
        flagged = rows["verdict"].eq(MALICIOUS).to_numpy(bool).astype(np.int8)
        warm = rows["warm"].fillna(False).to_numpy(bool)
        kind = self._kinds(rows)
        first_of_request = np.diff(rows["request"].to_numpy(np.int64), prepend=self._last_request) != 0
        self._last_request = int(rows["request"].iloc[-1])
        self._make_room(int(flow.max()))
        cumulative = self._cumulative(flow, kind, flagged, warm, judged)
        latest = np.column_stack([flow, kind, np.where(judged, flagged, -1)])
        window = np.concatenate([self._last_rows, latest])
        latencies = np.concatenate([self._latencies, latency[first_of_request]])
        requests_by = len(self._latencies) + np.cumsum(first_of_request)
        offset = len(self._last_rows)
        done = self.rows
        following = (done // self._stride + 1) * self._stride
        while following <= done + len(rows):
            i = following - done
            self._point(
                following,
                cumulative[i - 1],
                _by_kind(window[max(offset + i - WINDOW, 0) : offset + i], len(self._counts)),
                latencies[max(int(requests_by[i - 1]) - WINDOW, 0) : int(requests_by[i - 1])],
            )
            following = (following // self._stride + 1) * self._stride
        self.rows += len(rows)
        self.rejected += int((~judged).sum())
        self._counts = cumulative[-1]
        self._last_rows, self._latencies = window[-WINDOW:], latencies[-WINDOW:]
        self.requests += int(first_of_request.sum())
        np.add.at(self._histogram, np.searchsorted(_BINS, latency[first_of_request]), 1)

    def history(self) -> pd.DataFrame:
        """The past of all flows, one row a point, the last one now.

        Columns: `reports` answered; flows `right`, `missed`, `false_alarms`, `wrong`; `constant_wrong`, what a model
        that always says benign would have wrong; `recall`, `precision`, `fpr`, `balanced_accuracy`; `recent_recall`
        and `recent_fpr` of the last `WINDOW` reports' flows; `latency_p50` and `latency_p99`, ms, of the last
        `WINDOW` requests. NaN where undefined.
        """
        rows = []
        for point in self._past():
            all_, recent = _standing(point.counts), _standing(point.recent)
            rows.append(
                {
                    "reports": point.rows,
                    "right": all_.right,
                    "missed": all_.fn,
                    "false_alarms": all_.fp,
                    "wrong": all_.wrong,
                    "constant_wrong": all_.always(BENIGN).wrong,
                    "recall": all_.recall,
                    "precision": all_.precision,
                    "fpr": all_.fpr,
                    "balanced_accuracy": all_.balanced_accuracy,
                    "recent_recall": recent.recall,
                    "recent_fpr": recent.fpr,
                    "latency_p50": point.latency[0],
                    "latency_p99": point.latency[1],
                }
            )
        return pd.DataFrame(rows, columns=_HISTORY).astype(dict.fromkeys(_HISTORY[6:], "float64"))

    def family_history(self) -> pd.DataFrame:
        """The same by family: `reports`, `family`, `flows`, `flagged`, `recall`, `recent_recall`, once it has flows."""
        rows = []
        for point in self._past():
            for i, family in enumerate(self._families[: len(point.counts) - _FIRST_FAMILY], _FIRST_FAMILY):
                so_far, recent = _share(point.counts[i]), _share(point.recent[i])
                if so_far.flows:
                    rows.append((point.rows, family, so_far.flows, so_far.flagged, so_far.rate, recent.rate))
        columns = ["reports", "family", "flows", "flagged", "recall", "recent_recall"]
        return pd.DataFrame(rows, columns=columns).astype({"recall": "float64", "recent_recall": "float64"})

    def _past(self) -> list[_Point]:
        if not self.rows or (self._points and self._points[-1].rows == self.rows):
            return self._points
        recent = _by_kind(self._last_rows, len(self._counts))
        return [*self._points, _Point(self.rows, self._counts, recent, _quantiles(self._latencies))]

    def _point(self, rows: int, counts: Ints, recent: Ints, latencies: NDArray[np.float64]) -> None:
        self._points.append(_Point(rows, counts, recent, _quantiles(latencies)))
        if len(self._points) > MOST_POINTS:
            self._stride *= 2
            self._points = [point for point in self._points if point.rows % self._stride == 0]

    def _kinds(self, rows: pd.DataFrame) -> Ints:
        """What each row is: benign, unlabelled, or which family; new families get a place."""
        malicious = rows["expected"].eq(MALICIOUS).to_numpy(bool)
        family = rows["family"].where(rows["family"].notna(), GENERIC_FAMILY)
        places = {}
        for name in family[malicious].unique():
            known = str(name) if name in self._families or len(self._families) < MOST_FAMILIES else OTHERS
            if known not in self._families:
                self._families.append(known)
            places[name] = _FIRST_FAMILY + self._families.index(known)
        grown = _FIRST_FAMILY + len(self._families) - len(self._counts)
        self._counts = np.pad(self._counts, ((0, grown), (0, 0)))
        self._warm_counts = np.pad(self._warm_counts, ((0, grown), (0, 0)))
        kind = np.where(rows["expected"].eq(BENIGN).to_numpy(bool), _BENIGN, _UNLABELLED).astype(np.int64)
        kind[malicious] = family[malicious].map(places).to_numpy(np.int64)
        return kind

    def _make_room(self, highest: int) -> None:
        if highest >= len(self._verdict):
            more = max(highest + 1, 2 * len(self._verdict)) - len(self._verdict)
            self._verdict = np.pad(self._verdict, (0, more), constant_values=-1)
            self._warm = np.pad(self._warm, (0, more))

    def _cumulative(
        self, flow: Ints, kind: Ints, flagged: NDArray[np.int8], warm: NDArray[np.bool_], judged: NDArray[np.bool_]
    ) -> Ints:
        """Flows judged and flagged by kind, after each row: int64 [rows, kinds, 2]. Notes the flows' state."""
        where = np.flatnonzero(judged)
        order = where[np.argsort(flow[where], kind="stable")]
        same = np.diff(flow[order], prepend=-1) == 0
        before = np.where(same, np.roll(flagged[order], 1), self._verdict[flow[order]])
        new = before < 0
        gain = flagged[order] - np.maximum(before, 0)
        change = np.zeros((len(flow), len(self._counts), 2), np.int64)
        change[order, kind[order], 0] = new
        change[order, kind[order], 1] = gain
        self._warm[flow[order][new]] = warm[order][new]
        self.cold += int((new & ~warm[order]).sum())
        self._warm_counts += change[order[self._warm[flow[order]]]].sum(axis=0)
        self._verdict[flow[order]] = flagged[order]
        return np.asarray(self._counts + np.cumsum(change, axis=0))


_HISTORY: Final = [
    "reports",
    "right",
    "missed",
    "false_alarms",
    "wrong",
    "constant_wrong",
    "recall",
    "precision",
    "fpr",
    "balanced_accuracy",
    "recent_recall",
    "recent_fpr",
    "latency_p50",
    "latency_p99",
]


def card_of(description: Mapping[str, Any]) -> Card | None:
    """The promises in what the service says of its model at /v1/model; None if its card has no validation scores."""
    card = description.get("card")
    validation = card.get("validation") if isinstance(card, Mapping) else None
    scores = validation.get("corrected") if isinstance(validation, Mapping) else None
    if not isinstance(scores, Mapping):
        return None
    try:
        counts = scores["counts"]
        return Card(
            {name: Share(int(share["flows"]), int(share["flagged"])) for name, share in scores["families"].items()},
            Share(int(counts["fp"]) + int(counts["tn"]), int(counts["fp"])),
        )
    except (KeyError, TypeError, ValueError):
        return None


def findings(tally: Tally, card: Card | None, progress: Progress) -> list[Finding]:
    """What a reader must not overlook, the worst first; none for a healthy replay with attacks in it.

    A constant answer explains all else: of a constant model nothing more is said about its scores.
    """
    scores = [constant] if (constant := _constant(tally.standing)) else [*_skewed(tally, card), *_worse(tally, card)]
    found = scores + _lost(tally, progress) + _slow(tally) + _untested(tally)
    return sorted(found, key=lambda finding: finding.severity != "bad")


def _constant(standing: Standing) -> Finding | None:
    if standing.alarms == 0 and standing.malicious >= ENOUGH:
        right = f"{standing.accuracy:.0%}"
        return Finding(
            "constant",
            "bad",
            f"Every flow so far was called benign: this model finds nothing. It missed all {standing.malicious:,} "
            f"malicious flows; that it is {right} right says only that {right} of the flows are benign.",
        )
    if standing.alarms == standing.flows and standing.benign >= ENOUGH_BENIGN:
        return Finding(
            "constant",
            "bad",
            f"Every flow so far was called malicious: this model tells nothing apart. All {standing.benign:,} benign "
            f"flows were false alarms.",
        )
    return None


def _skewed(tally: Tally, card: Card | None) -> list[Finding]:
    standing = tally.warm_standing
    found = []
    if standing.flows >= 100 and standing.malicious >= ENOUGH:
        attacks, alarms = standing.malicious, standing.alarms
        # as if alarms came at FAR times the rate of attacks, or at a FAR-th of it
        too_many = bdtrc(alarms - 1, standing.flows, min(FAR * attacks / standing.flows, 1)) < CERTAIN
        too_few = bdtr(alarms, standing.flows, attacks / standing.flows / FAR) < CERTAIN
        if too_many or too_few:
            found.append(
                Finding(
                    "skewed",
                    "bad",
                    f"Far too {'many' if too_many else 'few'} alarms: {_percent(alarms / standing.flows)} of the flows "
                    f"were called malicious, {_percent(attacks / standing.flows)} are.",
                )
            )
    for name in tally.families:
        share = tally.family(name, warm=True)
        if share.flagged == 0 and share.flows >= ENOUGH:
            found.append(Finding("skewed", "bad", f"Blind to {name}: none of its {share.flows:,} flows was found."))
    if card is not None and standing.fp >= 5 and standing.fpr is not None:
        promised, bound = card.benign.rate or 0.0, _upper(card.benign)
        if standing.fpr > 2 * promised and bdtrc(standing.fp - 1, standing.benign, bound) < CERTAIN:
            found.append(
                Finding(
                    "skewed",
                    "bad" if standing.fpr > MANY_FALSE_ALARMS else "note",
                    f"More false alarms than its card says: {_percent(standing.fpr)} of the benign flows, "
                    f"{_percent(promised)} when it was validated.",
                )
            )
    return found


def _worse(tally: Tally, card: Card | None) -> list[Finding]:
    if card is None:
        return []
    found = []
    for name in tally.families:
        share, promised = tally.family(name, warm=True), card.families.get(name)
        if promised is None or share.rate is None or promised.rate is None or not share.flagged:
            continue
        chance = bdtr(share.flagged, share.flows, _lower(promised))
        if share.rate < promised.rate - WORSE_BY and chance < CERTAIN:
            found.append(
                Finding(
                    "worse",
                    "bad" if share.rate < FAR_WORSE * promised.rate else "note",
                    f"Worse than the card at {name}: found {_percent(share.rate)} of {share.flows:,} flows, "
                    f"{_percent(promised.rate)} when it was validated.",
                )
            )
    return found


def _lost(tally: Tally, progress: Progress) -> list[Finding]:
    found = []
    if tally.rejected:
        text = f"{tally.rejected:,} of {tally.rows:,} reports have no verdict: the service rejected them."
        found.append(Finding("lost", "bad", text))
    missing = progress.total - tally.rows
    if progress.finished and missing:
        found.append(Finding("lost", "bad", f"{missing:,} reports were never answered, though the replay has ended."))
    if not progress.finished and progress.silent_seconds > SILENT_SECONDS:
        text = (
            f"The replay stands still at report {tally.rows:,} of {progress.total:,}. If it was stopped, "
            "python -m flowsentry replay … --resume goes on from there."
        )
        found.append(Finding("stopped", "note", text))
    return found


def _slow(tally: Tally) -> list[Finding]:
    p99 = tally.latency(0.99)
    if p99 is None or tally.requests < 50 or p99 <= SLOW_MS:
        return []
    return [Finding("slow", "bad", f"Slow: one request in a hundred takes longer than {p99:,.0f} ms.")]


def _untested(tally: Tally) -> list[Finding]:
    malicious = tally.standing.malicious
    if malicious >= ENOUGH or not tally.flows:
        return []
    so_far = f"Only {malicious} malicious flows so far" if malicious else "No malicious flow so far"
    return [Finding("untested", "note", f"{so_far}: right answers prove nothing yet.")]


def _standing(counts: Ints) -> Standing:
    benign, attacks = counts[_BENIGN], counts[_FIRST_FAMILY:].sum(axis=0)
    return Standing(
        tp=int(attacks[1]), fp=int(benign[1]), tn=int(benign[0] - benign[1]), fn=int(attacks[0] - attacks[1])
    )


def _share(counts: Ints) -> Share:
    return Share(int(counts[0]), int(counts[1]))


def _by_kind(rows: Ints, kinds: int) -> Ints:
    """Flows and flagged flows by kind, each flow by its last row: int64 [kinds, 2] of rows (flow, kind, verdict)."""
    rows = rows[rows[:, 2] >= 0]
    _, last = np.unique(rows[::-1, 0], return_index=True)
    latest = rows[::-1][last]
    return np.column_stack(
        [
            np.bincount(latest[:, 1], minlength=kinds),
            np.bincount(latest[:, 1], weights=latest[:, 2], minlength=kinds).astype(np.int64),
        ]
    )


def _quantiles(latencies: NDArray[np.float64]) -> tuple[float, float]:
    if not latencies.size:
        return math.nan, math.nan
    middle, high = np.quantile(latencies, (0.5, 0.99))
    return float(middle), float(high)


def _lower(share: Share) -> float:
    """One-sided Clopper-Pearson bound of a rate."""
    return float(betaincinv(share.flagged, share.flows - share.flagged + 1, CARD_BOUND)) if share.flagged else 0.0


def _upper(share: Share) -> float:
    if share.flagged == share.flows:
        return 1.0
    return float(betaincinv(share.flagged + 1, share.flows - share.flagged, 1 - CARD_BOUND))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float) -> str:
    """Three digits where they matter: 12 %, 1.2 %, 0.12 %; never a nought that is none."""
    percent = 100 * share
    return f"{percent:.2f}%" if 0 < percent < 1 else f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"
