"""Reports and flows: which reports belong to one flow.

A meter reports an active flow again and again under one id, and gives the id to another flow when ports are reused.
A report begins a new flow when its id was not seen for an hour, when the report before it was final, or when it has
fewer bytes or a shorter duration than the report before it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from flowsentry.flows.hashing import compiled, find, hash_text, place_all
from flowsentry.flows.schema import MALICIOUS, is_malicious

FLOW_LIFETIME_TICKS: Final = 360
"""Ticks of 10 s after which a silent flow is forgotten: Packetbeat reports an active flow every tick."""
MAX_FLOWS: Final = 1 << 22
"""Most flow ids remembered at a time; beyond it the longest silent half of them is forgotten."""

KEY_LAST: Final = 0
BYTES: Final = 1
DURATION: Final = 2
STATE: Final = 3
FIRST: Final = 4
NUMBER: Final = 5
FIELDS: Final = 6

ENDED: Final = 1


@compiled
def is_continued(
    keys: np.ndarray,
    flows: np.ndarray,
    slot: int,
    tick: int,
    size: int,
    duration: int,
) -> bool:
    """Whether the report at `tick` goes on with the flow in `slot`."""
    return bool(
        keys[slot] != np.uint64(0)
        and tick - flows[slot, KEY_LAST] <= FLOW_LIFETIME_TICKS
        and flows[slot, STATE] & ENDED == 0
        and size >= flows[slot, BYTES]
        and duration >= flows[slot, DURATION]
    )


class FlowMemory:
    """The flows that may still be reported, by the hash of their id.

    `keys` uint64 [capacity], `flows` int64 [capacity, FIELDS]: tick of the last report, bytes, duration (ns), state
    bits, tick of the first report, number; `worst` float64 [capacity] and `alarms` int64 [capacity]: the highest score
    and the time of the first alarm (ms since 1970, 0: none), where flows are judged.
    """

    def __init__(self, capacity: int = 1 << 12) -> None:
        self.keys = np.zeros(capacity, np.uint64)
        self.flows = np.zeros((capacity, FIELDS), np.int64)
        self.worst = np.zeros(capacity)
        self.alarms = np.zeros(capacity, np.int64)
        self.used = 0

    def make_room(self, tick: int) -> None:
        """Forget flows that were silent for their lifetime; grow if that is not enough, up to `MAX_FLOWS`."""
        lifetime = FLOW_LIFETIME_TICKS
        keep = self._seen_since(tick - lifetime)
        capacity = len(self.keys)
        if keep.sum() * 2 > capacity:
            capacity = min(capacity * 2, MAX_FLOWS)
        while keep.sum() * 2 > capacity:
            lifetime //= 2
            keep = self._seen_since(tick - lifetime) if lifetime else np.zeros_like(keep)
        keys = np.zeros(capacity, np.uint64)
        moved = place_all(self.keys, keep, keys)
        self.flows, self.worst, self.alarms = (
            _moved(old, moved, keep, capacity) for old in (self.flows, self.worst, self.alarms)
        )
        self.keys, self.used = keys, int(keep.sum())

    def _seen_since(self, tick: int) -> np.ndarray:
        return np.asarray((self.keys != 0) & (self.flows[:, KEY_LAST] >= tick))


def _moved(old: np.ndarray, moved: np.ndarray, keep: np.ndarray, capacity: int) -> np.ndarray:
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[moved[keep]] = old[keep]
    return new


@compiled
def _number(
    keys: np.ndarray,
    flows: np.ndarray,
    used: int,
    start: int,
    following: int,
    ids: np.ndarray,
    ticks: np.ndarray,
    sizes: np.ndarray,
    durations: np.ndarray,
    finals: np.ndarray,
    numbers: np.ndarray,
) -> tuple[int, int, int]:
    for i in range(start, len(ids)):
        if used * 4 > len(keys) * 3:
            return i, used, following
        slot = find(keys, ids[i])
        if not is_continued(keys, flows, slot, ticks[i], sizes[i], durations[i]):
            if keys[slot] == np.uint64(0):
                keys[slot] = ids[i]
                used += 1
            flows[slot, NUMBER] = following
            following += 1
        flows[slot, KEY_LAST] = ticks[i]
        flows[slot, BYTES] = sizes[i]
        flows[slot, DURATION] = durations[i]
        flows[slot, STATE] = ENDED if finals[i] else 0
        numbers[i] = flows[slot, NUMBER]
    return len(ids), used, following


def clock_milliseconds(times: pd.Series, clock: int = 0) -> np.ndarray:
    """The stream's clock at every report, ms since 1970; event time that runs backwards is clamped.

    Args:
        times: when the reports were made, in arrival order.
        clock: the clock before the first of them.
    """
    milliseconds = times.dt.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64)
    return np.maximum(np.maximum.accumulate(milliseconds), clock)


def identify(reports: pd.DataFrame) -> np.ndarray:
    """Number the flows of every report.

    Args:
        reports: canonical reports, arrival order within each recording.

    Returns:
        int64 [reports]: numbers from 0 in order of first report, unique over recordings.
    """
    numbers = np.empty(len(reports), np.int64)
    following = 0
    for _, part in reports.groupby("recording", observed=True, sort=False):
        memory = FlowMemory()
        ids, ticks = hash_text(part["flow_id"]), clock_milliseconds(part["time"]) // 10_000
        sizes, durations = part["bytes"].to_numpy(np.int64), part["duration"].to_numpy(np.int64)
        result = np.empty(len(part), np.int64)
        position = 0
        while position < len(part):
            position, memory.used, following = _number(
                memory.keys, memory.flows, memory.used, position, following,
                ids, ticks, sizes, durations, part["final"].to_numpy(bool), result,
            )  # fmt: skip
            if position < len(part):
                memory.make_room(int(ticks[position]))
        numbers[reports.index.get_indexer(part.index)] = result
    return numbers


def collapse(reports: pd.DataFrame) -> pd.DataFrame:
    """One row per flow: its last report, how many reports it had, and the time of the first.

    The label is malicious if that of any report is, else that of the last report.

    Args:
        reports: canonical reports with the column `flow`.

    Returns:
        Table indexed by flow number, with the columns of `reports` and `reports` (int32) and `first_time`.
    """
    flow = reports["flow"].to_numpy()
    last = np.empty(int(flow.max(initial=-1)) + 1, np.int64)
    first = np.empty_like(last)
    positions = np.arange(len(flow))
    last[flow] = positions
    first[flow[::-1]] = positions[::-1]
    flows = reports.iloc[last].reset_index(drop=True)
    malicious = np.bincount(flow, weights=is_malicious(reports["label"]), minlength=len(last)) > 0
    if malicious.any():
        flows["label"] = flows["label"].mask(malicious, MALICIOUS)
    flows["reports"] = np.bincount(flow, minlength=len(last)).astype(np.int32)
    flows["first_time"] = reports["time"].iloc[first].reset_index(drop=True)
    return flows
