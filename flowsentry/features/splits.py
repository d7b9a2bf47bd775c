"""Splits: which flows are fitted on, which set the limit, and which are tested, for every protocol.

Splits are made by exchange, never by flow or port: twins and replies of one conversation stay on one side. An exchange
belongs to the time of its earliest flow (of its first report, where known); it is malicious if any of its flows is, by
the corrected label.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from flowsentry.errors import ProtocolError, StoreError
from flowsentry.flows.schema import TICK_SECONDS, is_malicious

Protocol = Literal["random", "time", "family", "recording"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("random", "time", "family", "recording")
PARTS: Final = ("fit", "calibration", "test", "validation", "warm-up", "last-tick", "unused")
"""`fit` and `calibration` are the training rows; `validation` exists in `random` only and is touched by selection
alone; `warm-up` and `last-tick` are reported apart and never scored; `unused` takes no part in a fold."""

RANDOM_SHARES: Final = {"fit": 0.595, "calibration": 0.105, "test": 0.2, "validation": 0.1}
"""70/20/10 as in the original study; 15% of the training flows are kept from the fit to set the limit."""
TIME_SHARE: Final = 0.7
"""Share of the flows that the cut of `time` leaves before it, as nearly as the classes allow."""
LEAST_SHARE: Final = 0.05
"""Least share of the malicious and of the benign flows on each side of that cut."""
BLOCK_SECONDS: Final = 300
CALIBRATION_TURN: Final = 4
"""Every fourth block of benign training flows is calibration."""
MOST_ROTATIONS: Final = 3

_MICROSECONDS: Final = 1_000_000
_TICK: Final = TICK_SECONDS * _MICROSECONDS
_LEAST_LAST_TICK: Final = 10
"""A recording of no more ticks than this has no last tick to report apart."""
_FIT, _CALIBRATION, _TEST, _VALIDATION, _WARM_UP, _LAST_TICK, _UNUSED = range(len(PARTS))

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Fold:
    """One division of the flows under a protocol."""

    name: str
    """Unique; the column of `Splits.parts`: `random`, `time`, `family/<group>/<rotation>`, `recording/<name>`."""
    protocol: Protocol
    held_out: str | None
    """Family protocol: the group of families that training never saw. Recording protocol: the tested recording."""
    rotation: int
    note: str
    """For people: where the cut is, how many exchanges, ..."""


@dataclass(frozen=True)
class Splits:
    """All folds of all protocols that these flows allow."""

    parts: pd.DataFrame
    """Index: flow number. One category column per fold with values of `PARTS`."""
    folds: tuple[Fold, ...]
    impossible: dict[str, str]
    """Protocols that these flows do not allow, with the reason."""

    def of(self, protocol: Protocol) -> list[Fold]:
        """The folds of a protocol; none if it is impossible."""
        return [fold for fold in self.folds if fold.protocol == protocol]

    def rows(self, fold: Fold | str, part: str) -> Ints:
        """Flow numbers (int64) of a part of a fold."""
        name = fold if isinstance(fold, str) else fold.name
        return self.parts.index[self.parts[name].eq(part).to_numpy(bool)].to_numpy(np.int64)

    def save(self, folder: Path) -> None:
        """Write `parts.parquet` and `splits.json` into an existing folder."""
        self.parts.rename_axis("flow").reset_index().to_parquet(folder / "parts.parquet", index=False)
        description = {"folds": [asdict(fold) for fold in self.folds], "impossible": self.impossible}
        (folder / "splits.json").write_text(json.dumps(description, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Splits:
        """Read what `save` wrote.

        Raises:
            StoreError: a file is missing or damaged, or the two do not belong together.
        """
        try:
            description = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
            folds = TypeAdapter(tuple[Fold, ...]).validate_python(description["folds"])
            impossible = TypeAdapter(dict[str, str]).validate_python(description["impossible"])
            table = pd.read_parquet(folder / "parts.parquet").set_index("flow")
        except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
            raise StoreError(
                f"splits in {folder} cannot be read ({type(error).__name__}); run the step again"
            ) from error
        names = [fold.name for fold in folds]
        fitting = list(table.columns) == names and table.index.is_unique and table.index.dtype == np.int64
        if not fitting or not table.isin(PARTS).all(axis=None):
            raise StoreError(f"splits in {folder}: parts.parquet does not belong to splits.json; run the step again")
        table.columns.name = None
        return cls(table.astype(pd.CategoricalDtype(list(PARTS))), folds, impossible)


def require(splits: Splits, protocol: Protocol) -> list[Fold]:
    """The folds of a protocol.

    Raises:
        ProtocolError: the flows do not allow the protocol.
    """
    if protocol in splits.impossible:
        possible = [name for name in PROTOCOLS if name not in splits.impossible]
        remedy = f"set select.protocol to {' or '.join(possible)}, or " if possible else ""
        raise ProtocolError(
            f"protocol {protocol} cannot be carried out on these flows: {splits.impossible[protocol]}; "
            f"{remedy}give other flows"
        )
    return splits.of(protocol)


def make_splits(flows: pd.DataFrame, *, seed: int = 0, warm_up_seconds: float, rotations: int = 3) -> Splits:
    """Divide flows under every protocol that they allow.

    In every fold an exchange wholly in the first `warm_up_seconds` of its recording is `warm-up`, one that begins in
    the recording's last tick `last-tick`, and a flow without a label `unused`. Of the others:

    - `random`: 70/20/10 of the flows, drawn within benign and within each family; 15% of the 70 are calibration.
    - `time`: one cut, on a tick, as near to 70% of the flows as both classes on both sides allow. Earlier benign
      exchanges are dealt in blocks of five minutes, every fourth to calibration.
    - `family`: each group of families held out in turn, in `rotations` rotations: benign blocks are dealt to fit,
      calibration and test in turn; the other groups are fitted on.
    - `recording`: each recording tested in turn, the others trained on as in `time`.

    Blocks are counted where they hold benign exchanges, and are shorter than five minutes in a short recording.

    Args:
        flows: flow table, index flow number, columns recording, time, label, exchange; corrected, group, family and
            first_time where known.
        seed: of the draw of `random`.
        warm_up_seconds: seconds, 0 for none.
        rotations: 1 to 3.

    Raises:
        ValueError: rotations are not 1 to 3.
    """
    if not 1 <= rotations <= MOST_ROTATIONS:
        raise ValueError(f"rotations must be 1 to {MOST_ROTATIONS}, not {rotations}")
    exchanges = _Exchanges(flows, warm_up_seconds)
    reason = exchanges.hopeless(warm_up_seconds)
    if reason:
        return Splits(_table({}, flows), (), dict.fromkeys(PROTOCOLS, reason))
    columns: dict[str, pd.Categorical] = {}
    folds: list[Fold] = []
    impossible: dict[str, str] = {}
    for protocol, made in (
        ("random", _random(exchanges, seed)),
        ("time", _time(exchanges)),
        ("family", _family(exchanges, rotations)),
        ("recording", _recording(exchanges)),
    ):
        if isinstance(made, str):
            impossible[protocol] = made
            continue
        for fold, part in made:
            folds.append(fold)
            columns[fold.name] = exchanges.to_flows(part)
    return Splits(_table(columns, flows), tuple(folds), impossible)


def _table(columns: dict[str, pd.Categorical], flows: pd.DataFrame) -> pd.DataFrame:
    index = pd.Index(flows.index.to_numpy(np.int64), name="flow")
    return pd.DataFrame(columns, index=index, columns=pd.Index(list(columns), dtype=object))


_Made = list[tuple[Fold, Ints]] | str
"""Folds with the part of every exchange, or why there are none."""


class _Exchanges:
    """The exchanges of a flow table, one element each."""

    def __init__(self, flows: pd.DataFrame, warm_up_seconds: float) -> None:
        corrected = flows["corrected"] if "corrected" in flows else flows["label"]
        malicious = is_malicious(corrected)
        self.labelled = corrected.notna().to_numpy(bool)
        self.of_flow, numbers = pd.factorize(flows["exchange"])
        count = len(numbers)
        self.size = np.bincount(self.of_flow[self.labelled], minlength=count)
        self.malicious_flows = np.bincount(self.of_flow[malicious], minlength=count)
        self.malicious = self.malicious_flows > 0
        self.groups = self._holds(flows, "group", malicious, count)
        self.families = self._holds(flows, "family", malicious, count) if "family" in flows else self.groups

        recording, self.recordings = pd.factorize(flows["recording"].astype(str))
        self.recording = np.zeros(count, np.int64)
        self.recording[self.of_flow] = recording
        last = _microseconds(flows["time"])
        time = _microseconds(flows["first_time"]) if "first_time" in flows else last
        self.start = np.full(count, np.iinfo(np.int64).max)
        end = np.full(count, np.iinfo(np.int64).min)
        np.minimum.at(self.start, self.of_flow, time)
        np.maximum.at(end, self.of_flow, time)
        self.begin = np.full(len(self.recordings), np.iinfo(np.int64).max)
        np.minimum.at(self.begin, recording, time)
        ticks = pd.Series(last // _TICK).groupby(recording).agg(["max", "nunique"])
        last_tick = np.where(ticks["nunique"] > _LEAST_LAST_TICK, ticks["max"], np.iinfo(np.int64).max)

        self.base = np.full(count, _UNUSED)
        self.base[end < self.begin[self.recording] + int(warm_up_seconds * _MICROSECONDS)] = _WARM_UP
        self.base[(self.base == _UNUSED) & (self.start // _TICK >= last_tick[self.recording])] = _LAST_TICK
        self.free: Bools = (self.base == _UNUSED) & (self.size > 0)
        self.benign: Bools = self.free & ~self.malicious
        self.attack: Bools = self.free & self.malicious

    def _holds(self, flows: pd.DataFrame, column: str, malicious: Bools, count: int) -> dict[str, Bools]:
        """Per group or family, by name: which exchanges hold a malicious flow of it; `attack` where unnamed."""
        given = flows[column].astype(object) if column in flows else pd.Series(None, index=flows.index, dtype=object)
        names = given.where(given.notna(), "attack").to_numpy(object)[malicious]
        holders = self.of_flow[malicious]
        return {
            str(name): np.bincount(holders[names == name], minlength=count) > 0 for name in sorted(pd.unique(names))
        }

    def hopeless(self, warm_up_seconds: float) -> str | None:
        """Why no protocol is possible, if so."""
        if not self.labelled.any():
            return "no flow is labelled"
        if not self.free.any():
            return f"nothing is left after the warm-up of {warm_up_seconds:g} s and the last tick"
        if not self.benign.any():
            return "no benign flow is left after the warm-up and the last tick"
        return None

    def to_flows(self, part: Ints) -> pd.Categorical:
        """The part of every flow from the part of every exchange."""
        of_flow = part[self.of_flow]
        of_flow[~self.labelled & (of_flow < _WARM_UP)] = _UNUSED
        return pd.Categorical.from_codes(of_flow.tolist(), dtype=pd.CategoricalDtype(list(PARTS)))

    def blocks(self, among: Bools, least: int) -> tuple[Ints, int, float]:
        """Deal exchanges into blocks of time within their recording.

        Returns:
            Rank of each exchange's block among those that hold any of `among` (only meaningful there), how many there
            are, and their length in seconds: `BLOCK_SECONDS` or less, down to a tick, so that there are `least` if
            possible.
        """
        length = BLOCK_SECONDS * _MICROSECONDS
        while True:
            block = (self.start - self.begin[self.recording]) // length
            chosen = block[among] + self.recording[among] * (int(block.max()) + 1)
            found, rank = np.unique(chosen, return_inverse=True)
            if found.size >= least or length == _TICK:
                ranks = np.zeros(self.start.size, np.int64)
                ranks[among] = rank
                return ranks, found.size, length / _MICROSECONDS
            length = max(length // 2, _TICK)

    def deal_training(self, part: Ints, among: Bools) -> str | None:
        """Divide training exchanges into fit and calibration; why not, if benign ones fill one block only."""
        benign = among & self.benign
        rank, count, _ = self.blocks(benign, CALIBRATION_TURN)
        if count < 2:
            return "benign training flows fill less than two ticks, too little for fit and calibration"
        turn = min(CALIBRATION_TURN, count)
        part[among] = _FIT
        part[benign & (rank % turn == turn - 1)] = _CALIBRATION
        return None

    def counts(self, among: Bools) -> tuple[int, int]:
        """Benign and malicious flows of exchanges."""
        return int(self.size[among & self.benign].sum()), int(self.malicious_flows[among & self.attack].sum())

    def tell(self, among: Bools) -> str:
        benign, malicious = self.counts(among)
        return f"{benign:,} benign and {malicious:,} malicious flows"


def _microseconds(times: pd.Series) -> Ints:
    return np.asarray(times.dt.as_unit("us").astype("int64"), np.int64)


def _random(exchanges: _Exchanges, seed: int) -> _Made:
    draw = np.random.default_rng(seed)
    part = exchanges.base.copy()
    bounds = np.cumsum(list(RANDOM_SHARES.values()))[:-1]
    for stratum in [exchanges.benign, *(exchanges.attack & holds for holds in exchanges.families.values())]:
        members = draw.permutation(np.flatnonzero(stratum & (part == _UNUSED)))
        size = exchanges.size[members]
        part[members] = np.searchsorted(bounds, (np.cumsum(size) - size / 2) / size.sum(), side="right")
    if any(not (exchanges.benign & (part == code)).any() for code in (_FIT, _CALIBRATION, _TEST)):
        return f"{int(exchanges.benign.sum())} benign exchanges are too few for fit, calibration and test"
    note = (
        f"{exchanges.tell(exchanges.free)} in {int(exchanges.free.sum()):,} exchanges, seed {seed}"
        + ("" if exchanges.attack.any() else "; nothing is malicious, recall cannot be scored")
    )  # fmt: skip
    return [(Fold("random", "random", None, 0, note), part)]


def _time(exchanges: _Exchanges) -> _Made:
    if not exchanges.attack.any():
        return "nothing is malicious"
    tick = exchanges.start // _TICK
    ticks, at = np.unique(tick[exchanges.free], return_inverse=True)

    def before(weight: Ints) -> Ints:
        """Weight before each tick but the first."""
        return np.asarray(np.cumsum(np.bincount(at, weights=weight[exchanges.free]))[:-1])

    malicious, benign = before(exchanges.malicious_flows), before(np.where(exchanges.benign, exchanges.size, 0))
    all_benign, all_malicious = exchanges.counts(exchanges.free)
    share = np.stack([malicious / all_malicious, benign / all_benign])
    fair = np.flatnonzero(((share >= LEAST_SHARE) & (share <= 1 - LEAST_SHARE)).all(axis=0))
    if fair.size == 0:
        return f"no cut leaves {LEAST_SHARE:.0%} of the malicious and of the benign flows on each side"
    flows = before(exchanges.size) / exchanges.size[exchanges.free].sum()
    best = fair[np.argmin(abs(flows[fair] - TIME_SHARE))]
    cut = ticks[best + 1]
    earlier, later = exchanges.free & (tick < cut), exchanges.free & (tick >= cut)
    part = exchanges.base.copy()
    part[later] = _TEST
    problem = exchanges.deal_training(part, earlier)
    if problem:
        return problem
    when = pd.Timestamp(int(cut) * TICK_SECONDS, unit="s", tz="UTC")
    note = f"cut at {when:%Y-%m-%d %H:%M:%S} UTC: {exchanges.tell(earlier)} before, {exchanges.tell(later)} after"
    return [(Fold("time", "time", None, 0, note), part)]


def _family(exchanges: _Exchanges, rotations: int) -> _Made:
    groups = {name: held for name, holds in exchanges.groups.items() if (held := exchanges.attack & holds).any()}
    if len(groups) < 2:
        return f"needs two groups of families, found {'only ' + next(iter(groups)) if groups else 'none'}"
    rank, count, seconds = exchanges.blocks(exchanges.benign, 3 * rotations)
    if count < 3:
        return "benign flows fill less than three ticks, too little for fit, calibration and test"
    made = []
    for group, held_out in groups.items():
        for rotation in range(rotations):
            part = exchanges.base.copy()
            part[exchanges.benign] = ((rank + rotation) % 3)[exchanges.benign]  # fit, calibration, test
            part[exchanges.attack] = _FIT
            part[held_out] = _TEST
            note = (
                f"{group} held out ({exchanges.counts(held_out)[1]:,} flows); "
                f"benign in {count} blocks of {seconds:g} s, {exchanges.counts(part == _TEST)[0]:,} flows tested"
            )
            made.append((Fold(f"family/{group}/{rotation}", "family", group, rotation, note), part))
    return made


def _recording(exchanges: _Exchanges) -> _Made:
    if len(exchanges.recordings) < 2:
        return "needs two recordings, found one"
    made: list[tuple[Fold, Ints]] = []
    problems = []
    for code, name in enumerate(exchanges.recordings):
        tested = exchanges.free & (exchanges.recording == code)
        training = exchanges.free & ~tested
        part = exchanges.base.copy()
        part[tested] = _TEST
        if not tested.any():
            problems.append(f"{name}: nothing is left to test after the warm-up and the last tick")
        elif 0 in exchanges.counts(training):
            problems.append(f"{name}: the other recordings do not hold both classes")
        elif problem := exchanges.deal_training(part, training):
            problems.append(f"{name}: {problem}")
        else:
            note = f"trained on {exchanges.tell(training)} of others, tested on {exchanges.tell(tested)}"
            made.append((Fold(f"recording/{name}", "recording", str(name), 0, note), part))
    return made or "; ".join(problems)
