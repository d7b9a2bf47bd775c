"""Evaluation: how well candidates and baselines find attacks, under every protocol and on both label sets.

No score without its protocol and its baselines: one call scores all of them side by side, at one limit. Only
rows of the part `test` are scored; warm-up and last tick are reported apart; `validation` is for
`validation_scores` alone.

A table of scores has one row per fold and flow: `fold` (category), `flow` (int64), `score` (float64, the
surprise), `flagged` (bool, at the limit) and `predicted` (bool, the model's own predict).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from pydantic import JsonValue

from flowsentry.features.splits import Fold, Protocol, Splits
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.reporting.metrics import (
    Bools,
    Counts,
    Floats,
    Ints,
    OwnRates,
    Rates,
    Share,
    count,
    own_rates,
    rates,
    share,
)
from flowsentry.reporting.results import (
    LABELS,
    PROTOCOLS,
    Entry,
    Evaluation,
    FoldNote,
    FoldScores,
    Labels,
    ProtocolScores,
    Spread,
)

LABEL_COLUMNS: Final[Mapping[Labels, str]] = {"published": "label", "corrected": "corrected"}
SCORE_COLUMNS: Final = ("fold", "flow", "score", "flagged", "predicted")
UNNAMED: Final = "unnamed"
"""Family of malicious flows of which the source does not say which attack they are."""
UNPLACED: Final = "malicious when corrected"
"""Place of flows that are benign as published only: places are those of flows benign on the corrected labels."""
APART: Final = ("warm-up", "last-tick")


def evaluate(
    flows: pd.DataFrame,
    splits: Splits,
    candidates: Mapping[str, pd.DataFrame],
    baselines: Mapping[str, pd.DataFrame],
    *,
    titles: Mapping[str, str],
    uses_identity: Mapping[str, bool],
    limit: float,
    data: Mapping[str, JsonValue],
) -> Evaluation:
    """Score every candidate and baseline under every protocol on the published and the corrected labels.

    Args:
        flows: the flow table (index: flow number) with `label` and `corrected`, and `family`, `group` and
            `place` where known. Flows without a label are not scored on that label set.
        splits: of the same flows.
        candidates: tables of scores by name, from simple to complex.
        baselines: the same for baselines.
        titles: names for people; the name itself where one is missing.
        uses_identity: by name; False where one is missing.
        limit: the surprise at which flows were flagged.
        data: what was evaluated; `view` names the feature view.

    Raises:
        ValueError: a table lacks columns or tested flows, has some twice, or a score that is no number.

    """
    truths = {labels: _Truth.of(flows, labels) for labels in LABELS}
    folds = [_FoldRows.of(flows, splits, fold, "test") for fold in splits.folds]
    entries = []
    for name, scores in [*candidates.items(), *baselines.items()]:
        table = _Scores.of(name, flows, scores)
        by_protocol: dict[Protocol, dict[Labels, ProtocolScores]] = {}
        for protocol in PROTOCOLS:
            mine = [rows for rows in folds if rows.fold.protocol == protocol]
            if mine:
                by_protocol[protocol] = {labels: _protocol_scores(table, mine, truths[labels]) for labels in LABELS}
        entries.append(
            Entry(
                name=name,
                title=titles.get(name, name),
                baseline=name not in candidates,
                uses_identity=uses_identity.get(name, False),
                scores=by_protocol,
            )
        )
    corrected = truths["corrected"]
    notes = []
    for rows in folds:
        known = corrected.known[rows.scored]
        malicious = int((corrected.malicious[rows.scored] & known).sum())
        benign = int(known.sum()) - malicious
        fold = rows.fold
        notes.append(
            FoldNote(fold=fold.name, protocol=fold.protocol, note=fold.note, benign=benign, malicious=malicious)
        )
    changed = corrected.known & truths["published"].known & (corrected.malicious != truths["published"].malicious)
    return Evaluation(
        limit=float(limit),
        data=dict(data),
        entries=tuple(entries),
        folds=tuple(notes),
        impossible=dict(splits.impossible),
        corrections=int(changed.sum()),
    )


def validation_scores(
    flows: pd.DataFrame, splits: Splits, scores: Mapping[str, pd.DataFrame]
) -> dict[str, dict[Labels, FoldScores]]:
    """The figures of `evaluate` on the validation part of `random`, for selection: by name and label set.

    Raises:
        ValueError: as `evaluate`; or the splits have no fold `random`, or a table has no scores for it.

    """
    fold = next((fold for fold in splits.folds if fold.protocol == "random"), None)
    if fold is None:
        raise ValueError("these splits have no fold of the protocol random, so no validation part")
    rows = _FoldRows.of(flows, splits, fold, "validation")
    result: dict[str, dict[Labels, FoldScores]] = {}
    for name, table in scores.items():
        mine = _Scores.of(name, flows, table)
        taken = mine.take(rows)
        if taken is None:
            raise ValueError(f"{name} has no scores for the fold {fold.name}")
        result[name] = {labels: _fold_scores(taken, rows, _Truth.of(flows, labels)) for labels in LABELS}
    return result


@dataclass(frozen=True)
class Pooled:
    """The tested rows of all folds of a protocol, one after the other; arrays of shape [n]."""

    position: Ints
    """Row of the flow table."""
    malicious: Bools
    score: Floats
    flagged: Bools


def pool(flows: pd.DataFrame, splits: Splits, scores: pd.DataFrame, *, protocol: Protocol, labels: Labels) -> Pooled:
    """What a candidate's curves are drawn from: labelled tested rows, those of one limit, so folds can be pooled.

    Raises:
        ValueError: as `evaluate`.
    """
    truth, table = _Truth.of(flows, labels), _Scores.of("this candidate", flows, scores)
    position, score, flagged = [np.array([], np.int64)], [np.array([])], [np.array([], bool)]
    for fold in splits.folds:
        if fold.protocol != protocol:
            continue
        rows = _FoldRows.of(flows, splits, fold, "test")
        taken = table.take(rows)
        if taken is not None:
            known = truth.known[rows.scored]
            position.append(rows.scored[known])
            score.append(taken.score[known])
            flagged.append(taken.flagged[known])
    where = np.concatenate(position)
    return Pooled(where, truth.malicious[where], np.concatenate(score), np.concatenate(flagged))


@dataclass(frozen=True)
class _Truth:
    """What is true of all flows on one label set; codes are -1 where nothing applies."""

    known: Bools
    malicious: Bools
    family: Ints
    families: tuple[str, ...]
    group: Ints
    groups: tuple[str, ...]
    place: Ints
    places: tuple[str, ...]

    @classmethod
    def of(cls, flows: pd.DataFrame, labels: Labels) -> _Truth:
        label = flows[LABEL_COLUMNS[labels]]
        malicious = label.eq(MALICIOUS).fillna(False).to_numpy(bool)
        known = malicious | label.eq(BENIGN).fillna(False).to_numpy(bool)
        family, families = _codes(flows, "family")
        if (malicious & (family < 0)).any():
            family = np.where(malicious & (family < 0), len(families), family)
            families = (*families, UNNAMED)
        group, groups = _codes(flows, "group")
        place, places = _codes(flows, "place")
        unplaced = known & ~malicious & (place < 0)
        if places and unplaced.any():
            place, places = np.where(unplaced, len(places), place), (*places, UNPLACED)
        return cls(known, malicious, family, families, group, groups, place, places)


@dataclass(frozen=True)
class _FoldRows:
    """Positions in the flow table of a fold's scored part and of the parts that are reported apart."""

    fold: Fold
    scored: Ints
    apart: dict[str, Ints]

    @classmethod
    def of(cls, flows: pd.DataFrame, splits: Splits, fold: Fold, part: str) -> _FoldRows:
        if not splits.parts.index.equals(flows.index):
            raise ValueError("the splits are of other flows: their index differs from the flow table's")
        parts = splits.parts[fold.name]
        apart = {name: np.flatnonzero(parts.eq(name).to_numpy(bool)) for name in APART}
        return cls(fold, np.flatnonzero(parts.eq(part).to_numpy(bool)), apart)


@dataclass(frozen=True)
class _Taken:
    """Scores aligned with the positions of a `_FoldRows`."""

    score: Floats
    flagged: Bools
    predicted: Bools
    apart_flagged: dict[str, Bools]
    apart: dict[str, Ints]


@dataclass(frozen=True)
class _Scores:
    """A table of scores as arrays, rows of one fold together."""

    name: str
    size: int
    position: Ints
    score: Floats
    flagged: Bools
    predicted: Bools
    rows: dict[str, Ints]

    @classmethod
    def of(cls, name: str, flows: pd.DataFrame, table: pd.DataFrame) -> _Scores:
        lacking = [column for column in SCORE_COLUMNS if column not in table]
        if lacking:
            raise ValueError(f"the scores of {name} lack the columns {', '.join(lacking)}")
        position = flows.index.get_indexer(pd.Index(table["flow"])).astype(np.int64)
        if (position < 0).any():
            raise ValueError(f"the scores of {name} have flows that the flow table does not have")
        codes, names = pd.factorize(table["fold"])
        return cls(
            name=name,
            size=len(flows),
            position=position,
            score=table["score"].to_numpy(np.float64),
            flagged=table["flagged"].to_numpy(bool),
            predicted=table["predicted"].to_numpy(bool),
            rows={str(fold): np.flatnonzero(codes == code) for code, fold in enumerate(names)},
        )

    def take(self, wanted: _FoldRows) -> _Taken | None:
        """The scores of a fold, or None if the table has none at all for it."""
        fold = wanted.fold.name
        rows = self.rows.get(fold)
        if rows is None:
            return None
        place = np.full(self.size, -1, np.int64)
        place[self.position[rows]] = rows
        if int((place >= 0).sum()) != rows.size:
            raise ValueError(f"the scores of {self.name} have flows twice in the fold {fold}")
        scored = place[wanted.scored]
        absent = int((scored < 0).sum())
        if absent:
            raise ValueError(f"the scores of {self.name} lack {absent} tested flows of the fold {fold}")
        if np.isnan(self.score[scored]).any():
            raise ValueError(f"the scores of {self.name} are not numbers in the fold {fold}")
        apart_rows = {part: place[positions] for part, positions in wanted.apart.items()}
        return _Taken(
            score=self.score[scored],
            flagged=self.flagged[scored],
            predicted=self.predicted[scored],
            apart_flagged={part: self.flagged[rows[rows >= 0]] for part, rows in apart_rows.items()},
            apart={part: wanted.apart[part][rows >= 0] for part, rows in apart_rows.items()},
        )


def _fold_scores(taken: _Taken, rows: _FoldRows, truth: _Truth) -> FoldScores:
    known = truth.known[rows.scored]
    positions = rows.scored[known]
    malicious, flagged, score = truth.malicious[positions], taken.flagged[known], taken.score[known]
    counts, own = count(malicious, flagged), count(malicious, taken.predicted[known])
    attacks = _attacks(rows.fold, truth)[positions]
    benign = ~malicious
    apart = {}
    for part, where in taken.apart.items():
        harmless = truth.known[where] & ~truth.malicious[where]
        if harmless.any():
            apart[part] = share(int(harmless.sum()), int((harmless & taken.apart_flagged[part]).sum()))
    return FoldScores(
        fold=rows.fold.name,
        held_out=rows.fold.held_out,
        rotation=rows.fold.rotation,
        counts=counts,
        at_limit=rates(counts, malicious, score),
        own_counts=own,
        own=own_rates(own),
        families=_shares(truth.family[positions], truth.families, attacks, flagged),
        places=_shares(truth.place[positions], truth.places, benign, flagged),
        apart=apart,
    )


def _attacks(fold: Fold, truth: _Truth) -> Bools:
    """Malicious flows whose recall counts in a fold; under the family protocol of the held-out group."""
    if fold.protocol != "family":
        return truth.malicious
    if fold.held_out not in truth.groups:
        return np.zeros(truth.malicious.size, bool)
    return np.asarray(truth.malicious & (truth.group == truth.groups.index(fold.held_out)), bool)


def _shares(codes: Ints, names: Sequence[str], among: Bools, flagged: Bools) -> dict[str, Share]:
    among = among & (codes >= 0)
    flows = np.bincount(codes[among], minlength=len(names))
    hits = np.bincount(codes[among & flagged], minlength=len(names))
    return {name: share(int(flows[i]), int(hits[i])) for i, name in enumerate(names) if flows[i]}


def _protocol_scores(table: _Scores, folds: Sequence[_FoldRows], truth: _Truth) -> ProtocolScores:
    results, missing = [], []
    attacked, harmless = np.zeros(table.size, bool), np.zeros(table.size, bool)
    apart_rows = {part: np.zeros(table.size, bool) for part in APART}
    for rows in folds:
        taken = table.take(rows)
        if taken is None:
            missing.append(rows.fold.name)
            continue
        results.append(_fold_scores(taken, rows, truth))
        tested = np.zeros(table.size, bool)
        tested[rows.scored] = True
        attacked |= tested & _attacks(rows.fold, truth)
        harmless |= tested & truth.known & ~truth.malicious
        for part, where in taken.apart.items():
            apart_rows[part][where] = True
    attacks = np.bincount(truth.family[attacked], minlength=len(truth.families))
    benign = np.bincount(truth.place[harmless & (truth.place >= 0)], minlength=len(truth.places))
    families = _spreads(
        [(fold.fold, fold.families) for fold in results],
        {name: int(attacks[i]) for i, name in enumerate(truth.families)},
        highest_is_worst=False,
    )
    return ProtocolScores(
        folds=tuple(results),
        missing=tuple(missing),
        benign=int(harmless.sum()),
        malicious=int(attacked.sum()),
        counts=_sum(fold.counts for fold in results),
        own_counts=_sum(fold.own_counts for fold in results),
        mean=Rates(**_mean([fold.at_limit.model_dump() for fold in results], Rates)),
        worst=Rates(**_worst([fold.at_limit.model_dump() for fold in results], Rates)),
        own_mean=OwnRates(**_mean([fold.own.model_dump() for fold in results], OwnRates)),
        own_worst=OwnRates(**_worst([fold.own.model_dump() for fold in results], OwnRates)),
        families=families,
        family_recall=_over_families(families),
        places=_spreads(
            [(fold.fold, fold.places) for fold in results],
            {name: int(benign[i]) for i, name in enumerate(truth.places)},
            highest_is_worst=True,
        ),
        apart=_spreads(
            [(fold.fold, fold.apart) for fold in results],
            {p: int((rows & truth.known & ~truth.malicious).sum()) for p, rows in apart_rows.items()},
            highest_is_worst=True,
        ),
    )


def _spreads(
    folds: Sequence[tuple[str, Mapping[str, Share]]], flows: Mapping[str, int], *, highest_is_worst: bool
) -> dict[str, Spread]:
    result = {}
    for name, number in flows.items():
        found = [(by_name[name].rate, fold) for fold, by_name in folds if name in by_name]
        defined = [(rate, fold) for rate, fold in found if rate is not None]
        if not defined:
            continue
        worst = (max if highest_is_worst else min)(defined, key=lambda pair: pair[0])
        mean = sum(rate for rate, _ in defined) / len(defined)
        result[name] = Spread(flows=number, mean=mean, worst=worst[0], worst_fold=worst[1])
    return result


def _over_families(families: Mapping[str, Spread]) -> Spread:
    means = [spread.mean for spread in families.values() if spread.mean is not None]
    worst = min(
        ((spread.worst, spread.worst_fold) for spread in families.values() if spread.worst is not None),
        key=lambda pair: pair[0],
        default=(None, None),
    )
    return Spread(
        flows=sum(spread.flows for spread in families.values()),
        mean=sum(means) / len(means) if means else None,
        worst=worst[0],
        worst_fold=worst[1],
    )


def _sum(counts: Iterable[Counts]) -> Counts:
    rows = list(counts)
    return Counts(
        tp=sum(c.tp for c in rows),
        fp=sum(c.fp for c in rows),
        tn=sum(c.tn for c in rows),
        fn=sum(c.fn for c in rows),
    )


def _defined(folds: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for fold in folds if (value := fold[name]) is not None]


def _mean(folds: Sequence[Mapping[str, float | None]], kind: type[Rates | OwnRates]) -> dict[str, float | None]:
    values = {name: _defined(folds, name) for name in kind.model_fields}
    return {name: sum(found) / len(found) if found else None for name, found in values.items()}


def _worst(folds: Sequence[Mapping[str, float | None]], kind: type[Rates | OwnRates]) -> dict[str, float | None]:
    values = {name: _defined(folds, name) for name in kind.model_fields}
    return {name: (max(found) if name == "fpr" else min(found)) if found else None for name, found in values.items()}


def _codes(flows: pd.DataFrame, column: str) -> tuple[Ints, tuple[str, ...]]:
    if column not in flows:
        return np.full(len(flows), -1, np.int64), ()
    values = flows[column].astype("category").cat.remove_unused_categories()
    return values.cat.codes.to_numpy().astype(np.int64), tuple(str(name) for name in values.cat.categories)
