"""The window kernel: one pass over a stream of reports that computes the `behaviour` features.

The same compiled code runs offline over a recording and online over whatever arrives. A report's features see the
report itself and those that arrived before it, never a later one, so cutting a stream into batches changes nothing.

Three kinds of entity are counted: the service (address, port, transport), its client (address) and the edge between
them. Each has a ring of 32 ticks for what is recent, and a baseline for what is normal: what it did up to 30 minutes
ago, or during the trusted warm-up. Failures of a service that never answered, and flows with a marked effect
(see `MARKS`), never become normal.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from flowsentry.errors import StoreError
from flowsentry.flows.columns import Columns
from flowsentry.flows.hashing import compiled, find, mix, place_all
from flowsentry.flows.reports import (
    BYTES,
    DURATION,
    ENDED,
    FIELDS,
    FIRST,
    KEY_LAST,
    MAX_FLOWS,
    NUMBER,
    STATE,
    FlowMemory,
    is_continued,
)

KERNEL_VERSION: Final = "2"

RING: Final = 32
"""Ticks of 10 s that a ring holds; the longest window is 30."""
BUCKET_TICKS: Final = 30
"""The baseline learns in buckets of 5 minutes."""
BUCKETS: Final = 8
LAG_TICKS: Final = 180
"""What an entity does becomes normal 30 minutes later: an attack must not teach the baseline while it lasts."""
WARM_UP_TICKS: Final = 180
"""The first 30 minutes of a stream are trusted: they become normal at once and are not scored."""
LONGEST_STEP_TICKS: Final = 30
"""A step of the clock counts this much towards the warm-up: one report with an old time teaches nothing."""
LIFETIME_TICKS: Final = 360
"""An entity without a baseline is forgotten after an hour of silence."""
KNOWN_LIFETIME_TICKS: Final = 8640
"""An entity with a baseline is forgotten after a day of silence."""
MAX_ENTITIES: Final = 1 << 19
"""Most entities remembered (about 400 MB); beyond it the longest silent ones are forgotten."""
MAX_ENDPOINTS: Final = 1 << 22

EPHEMERAL_PORT: Final = 32_768
"""First port that Linux gives to clients."""
SIZEABLE_BYTES: Final = 1_000_000.0
"""Bytes a minute below which no edge's volume counts as large."""

# Rings of an entity: flows, flows without payload; an edge: bytes; a client: new edges, new edges that only failed.
FLOWS, FAILS, VOLUME, FAILED_EDGES = 0, 1, 2, 3
NEW_EDGES: Final = VOLUME
RINGS: Final = 4
# A bucket and the baseline: flows, and the highest count of flows, failures and bytes in 60 s.
PEAK_FLOWS, PEAK_FAILS, PEAK_VOLUME = 1, 2, 3
LEARNED: Final = 4
# Whole numbers kept for an entity; failing: an edge that its client's ring counts among the failed ones.
LAST, FIRST_SEEN, OLDEST_BUCKET, ANSWERED, FAILED, FAILING = 0, 1, 2, 3, 4, 5
COUNTERS: Final = 6

WAS_NO_PAYLOAD: Final = 2
WAS_REVERSED: Final = 4

FEATURES: Final = (
    "no_payload",
    "edge_new",
    "service_new",
    "edge_fails_10s",
    "edge_fails_60s",
    "edge_fails_300s",
    "service_fails_60s",
    "client_fails_60s",
    "edge_fail_burst",
    "service_fail_burst",
    "client_fail_burst",
    "edge_burst",
    "service_burst",
    "client_burst",
    "edge_fail_share",
    "service_fail_share",
    "client_failed_edges",
    "client_new_edges",
    "service_dead",
    "edge_dead",
    "edge_bytes_burst",
    "edge_persistence",
)
(
    NO_PAYLOAD,
    EDGE_NEW,
    SERVICE_NEW,
    EDGE_FAILS_10,
    EDGE_FAILS_60,
    EDGE_FAILS_300,
    SERVICE_FAILS_60,
    CLIENT_FAILS_60,
    EDGE_FAIL_BURST,
    SERVICE_FAIL_BURST,
    CLIENT_FAIL_BURST,
    EDGE_BURST,
    SERVICE_BURST,
    CLIENT_BURST,
    EDGE_FAIL_SHARE,
    SERVICE_FAIL_SHARE,
    CLIENT_FAILED_EDGES,
    CLIENT_NEW_EDGES,
    SERVICE_DEAD,
    EDGE_DEAD,
    EDGE_BYTES_BURST,
    EDGE_PERSISTENCE,
) = range(len(FEATURES))

MARKS: Final = (
    (EDGE_FAIL_BURST, 17.0),
    (SERVICE_DEAD, 4.0),
    (CLIENT_FAILED_EDGES, 10.0),
    (EDGE_BURST, 50.0),
    (EDGE_BYTES_BURST, 10.0),
)
"""Effects so large that their flows are kept out of the baseline (feature, limit)."""
_MARK_FEATURES: Final = np.array([feature for feature, _ in MARKS])
_MARK_LIMITS: Final = np.array([limit for _, limit in MARKS], np.float32)


@compiled
def _touch(
    counters: np.ndarray,
    rings: np.ndarray,
    buckets: np.ndarray,
    baseline: np.ndarray,
    slot: int,
    tick: int,
    begin: int,
    trusted_until: int,
) -> None:
    """Bring an entity to `tick`: learn its old buckets, forget it if its lifetime is over, empty its silent ticks."""
    bucket = (tick - begin) // BUCKET_TICKS
    silent = tick - counters[slot, LAST]
    if counters[slot, FIRST_SEEN] >= 0:
        horizon = max(min(tick, trusted_until), tick - LAG_TICKS)
        ripe = min((horizon - begin) // BUCKET_TICKS, bucket)
        oldest = counters[slot, OLDEST_BUCKET]
        for b in range(oldest, min(ripe, oldest + BUCKETS)):
            for field in range(LEARNED):
                learned = buckets[slot, b % BUCKETS, field]
                if field >= PEAK_FLOWS:
                    baseline[slot, field] = max(baseline[slot, field], learned)
                else:
                    baseline[slot, field] += learned
                buckets[slot, b % BUCKETS, field] = 0
        counters[slot, OLDEST_BUCKET] = max(oldest, ripe)
    lifetime = KNOWN_LIFETIME_TICKS if baseline[slot, FLOWS] > 0 else LIFETIME_TICKS
    if counters[slot, FIRST_SEEN] < 0 or silent > lifetime:
        counters[slot, :] = 0
        counters[slot, FIRST_SEEN] = tick
        counters[slot, OLDEST_BUCKET] = bucket
        rings[slot, :, :] = 0
        buckets[slot, :, :] = 0
        baseline[slot, :] = 0
    else:
        for gap in range(1, min(silent, RING) + 1):
            rings[slot, :, (tick - gap + 1) % RING] = 0
    counters[slot, LAST] = tick


@compiled
def _window(rings: np.ndarray, slot: int, ring: int, tick: int, ticks: int) -> np.float32:
    total = np.float32(0)
    for back in range(ticks):
        total += rings[slot, ring, (tick - back) % RING]
    return total


@compiled
def _learn(
    buckets: np.ndarray, slot: int, bucket: int, flows: np.float32, peaks: tuple[np.float32, np.float32, np.float32]
) -> None:
    place = bucket % BUCKETS
    buckets[slot, place, FLOWS] += flows
    for field in range(3):
        buckets[slot, place, PEAK_FLOWS + field] = max(buckets[slot, place, PEAK_FLOWS + field], peaks[field])


@compiled
def _slot(keys: np.ndarray, counters: np.ndarray, key: np.uint64) -> tuple[int, int]:
    """Slot of an entity and 1 if it had to be made."""
    slot = find(keys, key)
    if keys[slot] == np.uint64(0):
        keys[slot] = key
        counters[slot, FIRST_SEEN] = -1
        return slot, 1
    return slot, 0


@compiled
def _seen(keys: np.ndarray, endpoints: np.ndarray, key: np.uint64, tick: int) -> tuple[int, int]:
    """Count one more flow of an endpoint; returns the count and 1 if the endpoint is new to the table."""
    slot = find(keys, key)
    made = 0
    if keys[slot] == np.uint64(0):
        keys[slot] = key
        made = 1
    elif tick - endpoints[slot, 0] > LIFETIME_TICKS:
        endpoints[slot, 1] = 0
    endpoints[slot, 0] = tick
    endpoints[slot, 1] += 1
    return endpoints[slot, 1], made


@compiled
def _advance(
    position: int,
    begin: int,
    flow_keys: np.ndarray,
    flows: np.ndarray,
    endpoint_keys: np.ndarray,
    endpoints: np.ndarray,
    keys: np.ndarray,
    counters: np.ndarray,
    rings: np.ndarray,
    buckets: np.ndarray,
    baseline: np.ndarray,
    used: np.ndarray,
    trust: np.ndarray,
    ticks: np.ndarray,
    ids: np.ndarray,
    finals: np.ndarray,
    sources: np.ndarray,
    destinations: np.ndarray,
    source_ports: np.ndarray,
    destination_ports: np.ndarray,
    transports: np.ndarray,
    sizes: np.ndarray,
    payload: np.ndarray,
    durations: np.ndarray,
    features: np.ndarray,
    reversed_: np.ndarray,
    numbers: np.ndarray,
    fresh: np.ndarray,
    warm: np.ndarray,
) -> int:
    """Take in the reports from `position` on; returns where it stopped, before the end if a table is full.

    `used`: slots in use of the flow, endpoint and entity tables, and the flows so far. `trust`: the tick of the last
    report, and the one that the warm-up ends with. `features` float32 [reports, FEATURES], `reversed_` bool [reports]
    (the source is the service), `numbers` int64 [reports] (of the flow in its stream), `fresh` bool [reports] (the
    first report of its flow) and `warm` bool [reports] are filled.
    """
    one = np.float32(1)
    for i in range(position, len(ticks)):
        if used[0] * 4 > len(flow_keys) * 3 or used[1] * 4 > len(endpoint_keys) * 3 or used[2] * 4 > len(keys) * 3:
            return i
        tick = ticks[i]
        transport = np.uint64(transports[i])
        step = tick - trust[0]
        if step > KNOWN_LIFETIME_TICKS:  # nothing is known any more
            trust[1] = tick + WARM_UP_TICKS
        elif step > LONGEST_STEP_TICKS and trust[0] < trust[1]:
            trust[1] += step - LONGEST_STEP_TICKS
        trust[0] = tick
        trusted = tick < trust[1]
        warm[i] = not trusted

        # Which flow is it, and what did the report add to it?
        flow = find(flow_keys, ids[i])
        continued = is_continued(flow_keys, flows, flow, tick, sizes[i], durations[i])
        added = sizes[i]
        if continued:
            added = sizes[i] - flows[flow, BYTES]
            state = flows[flow, STATE]
        else:
            if flow_keys[flow] == np.uint64(0):
                flow_keys[flow] = ids[i]
                used[0] += 1
            flows[flow, FIRST] = tick
            flows[flow, NUMBER] = used[3]
            used[3] += 1
            # The service is the endpoint seen in more flows so far; from a client's port to another it is clear.
            source_end = mix(mix(sources[i], np.uint64(source_ports[i])), transport)
            destination_end = mix(mix(destinations[i], np.uint64(destination_ports[i])), transport)
            source_count, made = _seen(endpoint_keys, endpoints, source_end, tick)
            used[1] += made
            destination_count, made = _seen(endpoint_keys, endpoints, destination_end, tick)
            used[1] += made
            obvious = source_ports[i] >= EPHEMERAL_PORT > destination_ports[i]
            state = WAS_REVERSED if source_count > destination_count and not obvious else 0
        is_reversed = state & WAS_REVERSED != 0
        reversed_[i] = is_reversed
        numbers[i] = flows[flow, NUMBER]
        fresh[i] = not continued
        empty = not payload[i]

        server = sources[i] if is_reversed else destinations[i]
        port = source_ports[i] if is_reversed else destination_ports[i]
        person = destinations[i] if is_reversed else sources[i]
        service_key = mix(mix(mix(server, np.uint64(port)), transport), np.uint64(1))
        client_key = mix(person, np.uint64(2))
        service, made = _slot(keys, counters, service_key)
        used[2] += made
        client, made = _slot(keys, counters, client_key)
        used[2] += made
        edge, made = _slot(keys, counters, mix(client_key, service_key))
        used[2] += made
        for entity in (service, client, edge):
            _touch(counters, rings, buckets, baseline, entity, tick, begin, trust[1])

        # Count it.
        now = tick % RING
        if not continued:
            for entity in (service, client, edge):
                rings[entity, FLOWS, now] += one
                if empty:
                    rings[entity, FAILS, now] += one
                    counters[entity, FAILED] += 1
                else:
                    counters[entity, ANSWERED] += 1
            if baseline[edge, FLOWS] == 0 and counters[edge, FAILED] + counters[edge, ANSWERED] == 1:
                rings[client, NEW_EDGES, now] += one
                if empty:
                    counters[edge, FAILING] = 1
                    rings[client, FAILED_EDGES, now] += one
            if empty:
                state |= WAS_NO_PAYLOAD
        elif state & WAS_NO_PAYLOAD and not empty:
            # It looked like a failure and then carried something: take the failure back.
            state &= ~WAS_NO_PAYLOAD
            first = flows[flow, FIRST]
            for entity in (service, client, edge):
                counters[entity, ANSWERED] += 1
                counters[entity, FAILED] = max(counters[entity, FAILED] - 1, 0)
                if tick - first < RING:
                    rings[entity, FAILS, first % RING] = max(rings[entity, FAILS, first % RING] - one, np.float32(0))
        if counters[edge, FAILING] == 1 and counters[edge, ANSWERED] > 0:
            counters[edge, FAILING] = 0
            since = counters[edge, FIRST_SEEN]
            if tick - since < RING:
                place = since % RING
                rings[client, FAILED_EDGES, place] = max(rings[client, FAILED_EDGES, place] - one, np.float32(0))
        rings[edge, VOLUME, now] += np.float32(added)
        flows[flow, KEY_LAST] = tick
        flows[flow, BYTES] = sizes[i]
        flows[flow, DURATION] = durations[i]
        flows[flow, STATE] = (state & ~ENDED) | (ENDED if finals[i] else 0)

        # Describe it.
        row = features[i]
        edge_flows = _window(rings, edge, FLOWS, tick, 6)
        edge_fails = _window(rings, edge, FAILS, tick, 6)
        edge_fails_long = _window(rings, edge, FAILS, tick, 30)
        edge_volume = _window(rings, edge, VOLUME, tick, 6)
        service_flows = _window(rings, service, FLOWS, tick, 6)
        service_fails = _window(rings, service, FAILS, tick, 6)
        client_flows = _window(rings, client, FLOWS, tick, 6)
        client_fails = _window(rings, client, FAILS, tick, 6)
        edge_new = baseline[edge, FLOWS] == 0
        service_new = baseline[service, FLOWS] == 0
        own = one if empty else np.float32(0)
        own_or_new = one if empty or edge_new else np.float32(0)
        row[NO_PAYLOAD] = own
        row[EDGE_NEW] = one if edge_new else 0
        row[SERVICE_NEW] = one if service_new else 0
        row[EDGE_FAILS_10] = rings[edge, FAILS, now]
        row[EDGE_FAILS_60] = edge_fails
        row[EDGE_FAILS_300] = edge_fails_long
        row[SERVICE_FAILS_60] = own * service_fails
        row[CLIENT_FAILS_60] = own * client_fails
        row[EDGE_FAIL_BURST] = edge_fails / max(one, baseline[edge, PEAK_FAILS])
        row[SERVICE_FAIL_BURST] = own * service_fails / max(one, baseline[service, PEAK_FAILS])
        row[CLIENT_FAIL_BURST] = own * client_fails / max(one, baseline[client, PEAK_FAILS])
        row[EDGE_BURST] = edge_flows / max(one, baseline[edge, PEAK_FLOWS])
        row[SERVICE_BURST] = own_or_new * service_flows / max(one, baseline[service, PEAK_FLOWS])
        row[CLIENT_BURST] = own_or_new * client_flows / max(one, baseline[client, PEAK_FLOWS])
        row[EDGE_FAIL_SHARE] = edge_fails_long / max(one, _window(rings, edge, FLOWS, tick, 30))
        row[SERVICE_FAIL_SHARE] = (
            own * _window(rings, service, FAILS, tick, 30) / max(one, _window(rings, service, FLOWS, tick, 30))
        )
        alone = edge_new and empty and counters[edge, ANSWERED] == 0
        row[CLIENT_FAILED_EDGES] = _window(rings, client, FAILED_EDGES, tick, 30) if alone else 0
        row[CLIENT_NEW_EDGES] = _window(rings, client, NEW_EDGES, tick, 30) if edge_new else 0
        row[SERVICE_DEAD] = counters[service, FAILED] if service_new and counters[service, ANSWERED] == 0 else 0
        row[EDGE_DEAD] = counters[edge, FAILED] if edge_new and counters[edge, ANSWERED] == 0 else 0
        row[EDGE_BYTES_BURST] = edge_volume / max(np.float32(SIZEABLE_BYTES), baseline[edge, PEAK_VOLUME])
        active = 0
        if edge_new:
            for back in range(30):
                if rings[edge, FLOWS, (tick - back) % RING] > 0:
                    active += 1
        row[EDGE_PERSISTENCE] = active

        # Let it become normal, later.
        marked = False
        for m in range(len(_MARK_FEATURES)):
            if row[_MARK_FEATURES[m]] >= _MARK_LIMITS[m]:
                marked = True
        if not marked or trusted:
            bucket = (tick - begin) // BUCKET_TICKS
            for entity in (service, client, edge):
                if trusted or counters[entity, ANSWERED] > 0 or entity == client:
                    volume = edge_volume if entity == edge else np.float32(0)
                    peaks = (
                        _window(rings, entity, FLOWS, tick, 6),
                        _window(rings, entity, FAILS, tick, 6),
                        volume,
                    )
                    _learn(buckets, entity, bucket, np.float32(0 if continued else 1), peaks)
    return len(ticks)


@compiled
def _remember(
    keys: np.ndarray,
    worst: np.ndarray,
    alarms: np.ndarray,
    ids: np.ndarray,
    fresh: np.ndarray,
    clock: np.ndarray,
    limit: float,
    scores: np.ndarray,
    first_alarms: np.ndarray,
) -> None:
    """Raise each flow's worst score; `scores` become the worst so far, `first_alarms` are filled (0: none yet)."""
    for i in range(len(ids)):
        slot = find(keys, ids[i])
        if fresh[i]:
            worst[slot] = scores[i]
            alarms[slot] = 0
        else:
            worst[slot] = max(worst[slot], scores[i])
        if alarms[slot] == 0 and worst[slot] >= limit:
            alarms[slot] = clock[i]
        scores[i] = worst[slot]
        first_alarms[i] = alarms[slot]


@dataclass
class _Table:
    """An open-addressing table: keys, and arrays with one row per slot."""

    keys: np.ndarray
    arrays: dict[str, np.ndarray]

    @classmethod
    def empty(cls, capacity: int, shapes: dict[str, tuple[tuple[int, ...], str]]) -> _Table:
        arrays = {name: np.zeros((capacity, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        return cls(np.zeros(capacity, np.uint64), arrays)

    def rebuilt(self, keep: np.ndarray, capacity: int) -> _Table:
        """A table of `capacity` slots with the kept rows of this one."""
        keys = np.zeros(capacity, np.uint64)
        moved = place_all(self.keys, keep, keys)
        arrays = {}
        for name, old in self.arrays.items():
            arrays[name] = np.zeros((capacity, *old.shape[1:]), old.dtype)
            arrays[name][moved[keep]] = old[keep]
        return _Table(keys, arrays)


_ENTITY_SHAPES: Final[dict[str, tuple[tuple[int, ...], str]]] = {
    "counters": ((COUNTERS,), "int64"),
    "rings": ((RINGS, RING), "float32"),
    "buckets": ((BUCKETS, LEARNED), "float32"),
    "baseline": ((LEARNED,), "float32"),
}
_ENDPOINT_SHAPES: Final[dict[str, tuple[tuple[int, ...], str]]] = {"endpoints": ((2,), "int64")}
_TABLES: Final[dict[str, tuple[dict[str, tuple[tuple[int, ...], str]], int]]] = {
    "flow": ({"flows": ((FIELDS,), "int64"), "worst": ((), "float64"), "alarms": ((), "int64")}, MAX_FLOWS),
    "endpoint": (_ENDPOINT_SHAPES, MAX_ENDPOINTS),
    "entity": (_ENTITY_SHAPES, MAX_ENTITIES),
}
"""Tables of a checkpoint: what a row holds, and the most slots."""


@dataclass(frozen=True)
class Advanced:
    """What a stream says of the reports that it took in; first dimension [reports]."""

    features: np.ndarray
    """float32 [reports, len(FEATURES)]."""
    is_reversed: np.ndarray
    """bool: the reported source is the service, not the client."""
    flow: np.ndarray
    """int64: number of the flow in its stream, from 0."""
    warm: np.ndarray
    """bool: the stream's warm-up is over."""
    clock: np.ndarray
    """int64: the stream's clock, ms since 1970."""
    worst: np.ndarray
    """float64: the flow's highest score so far; 0 without a judge."""
    first_alarm: np.ndarray
    """int64: the clock when the flow first reached the limit, ms since 1970; 0 if it has not."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a stream at one moment, to be written while the stream goes on."""

    arrays: dict[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """A checkpoint, readable by `Stream.load` of the same kernel version."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in self.arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        return content.getvalue()


_MOST_BYTES: Final = (1 << 16) + sum(
    most * (8 + sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values()))
    for shapes, most in _TABLES.values()
)
"""Bytes of a checkpoint whose tables are full."""


class Stream:
    """What a stream of reports has left behind: everything that the features of the next report depend on, and the
    worst score of every flow that may still be reported.
    """

    def __init__(self) -> None:
        self.seen = 0
        """Reports that the stream has seen."""
        self._begin = -1
        self._clock = 0
        self._flows = FlowMemory()
        self._endpoints = _Table.empty(1 << 12, _ENDPOINT_SHAPES)
        self._entities = _Table.empty(1 << 12, _ENTITY_SHAPES)
        self._used = np.zeros(4, np.int64)
        self._trust = np.zeros(2, np.int64)

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return self._begin >= 0 and bool(self._trust[0] >= self._trust[1])

    @property
    def nbytes(self) -> int:
        """Memory of the tables, bytes."""
        tables = [self._endpoints, self._entities]
        arrays = [array for table in tables for array in (table.keys, *table.arrays.values())]
        memory = self._flows
        return sum(array.nbytes for array in (*arrays, memory.keys, memory.flows, memory.worst, memory.alarms))

    def advance(
        self,
        reports: Columns,
        judge: Callable[[np.ndarray], np.ndarray] | None = None,
        limit: float = np.inf,
    ) -> Advanced:
        """Take in the next reports of the stream.

        Args:
            reports: in arrival order.
            judge: gives a score for each of some rows of features, float32 [rows, len(FEATURES)] to float64 [rows].
            limit: score at and above which a report is an alarm.
        """
        count = len(reports)
        features = np.zeros((count, len(FEATURES)), np.float32)
        is_reversed, fresh, warm = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, bool)
        numbers, first_alarms = np.zeros(count, np.int64), np.zeros(count, np.int64)
        worst = np.zeros(count)
        clock = np.maximum(np.maximum.accumulate(reports.time), self._clock)
        ticks = clock // 10_000
        if self._begin < 0 and count:
            self._begin = int(ticks[0])
            self._trust[:] = self._begin, self._begin + WARM_UP_TICKS
        position = 0
        while position < count:
            stop = _advance(
                position,
                self._begin,
                self._flows.keys,
                self._flows.flows,
                self._endpoints.keys,
                self._endpoints.arrays["endpoints"],
                self._entities.keys,
                self._entities.arrays["counters"],
                self._entities.arrays["rings"],
                self._entities.arrays["buckets"],
                self._entities.arrays["baseline"],
                self._used,
                self._trust,
                ticks,
                reports.flow_id,
                reports.final,
                reports.src_ip,
                reports.dst_ip,
                reports.src_port,
                reports.dst_port,
                reports.transport,
                reports.bytes,
                reports.payload,
                reports.duration,
                features,
                is_reversed,
                numbers,
                fresh,
                warm,
            )
            if judge is not None and stop > position:
                part = slice(position, stop)
                worst[part] = judge(features[part])
                _remember(
                    self._flows.keys,
                    self._flows.worst,
                    self._flows.alarms,
                    reports.flow_id[part],
                    fresh[part],
                    clock[part],
                    limit,
                    worst[part],
                    first_alarms[part],
                )
            position = stop
            if position < count:
                self._make_room(int(ticks[position]))
        if count:
            self._clock = int(clock[-1])
        self.seen += count
        return Advanced(features, is_reversed, numbers, warm, clock, worst, first_alarms)

    def _make_room(self, tick: int) -> None:
        if self._used[0] * 4 > len(self._flows.keys) * 3:
            self._flows.make_room(tick)
            self._used[0] = self._flows.used
        if self._used[1] * 4 > len(self._endpoints.keys) * 3:
            age = tick - self._endpoints.arrays["endpoints"][:, 0]
            self._endpoints = _thinned(self._endpoints, age, LIFETIME_TICKS, MAX_ENDPOINTS)
            self._used[1] = np.count_nonzero(self._endpoints.keys)
        if self._used[2] * 4 > len(self._entities.keys) * 3:
            waiting = self._entities.arrays["buckets"][:, :, FLOWS].sum(axis=1)
            known = self._entities.arrays["baseline"][:, FLOWS] + waiting > 0
            age = tick - self._entities.arrays["counters"][:, LAST]
            lifetime = np.where(known, KNOWN_LIFETIME_TICKS, LIFETIME_TICKS)
            self._entities = _thinned(self._entities, age, lifetime, MAX_ENTITIES)
            self._used[2] = np.count_nonzero(self._entities.keys)

    def snapshot(self, judged_by: str = "") -> Snapshot:
        """A copy for a checkpoint.

        Args:
            judged_by: what gave the scores; whoever reads it with another judge begins without worst scores.
        """
        header = {
            "kernel": KERNEL_VERSION,
            "features": list(FEATURES),
            "seen": self.seen,
            "begin": self._begin,
            "clock": self._clock,
            "trust": self._trust.tolist(),
            "flows": int(self._used[3]),
            "judged_by": judged_by,
            "capacities": [len(self._flows.keys), len(self._endpoints.keys), len(self._entities.keys)],
        }
        memory = self._flows
        tables = {
            "flow": _Table(memory.keys, {"flows": memory.flows, "worst": memory.worst, "alarms": memory.alarms}),
            "endpoint": self._endpoints,
            "entity": self._entities,
        }
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for kind, table in tables.items():
            kept = table.keys != 0
            arrays[f"{kind}_keys"] = table.keys[kept]
            arrays.update({f"{kind}_{name}": array[kept] for name, array in table.arrays.items()})
        return Snapshot(arrays)

    @classmethod
    def load(cls, content: bytes, judged_by: str = "") -> Stream:
        """Read a checkpoint.

        Args:
            content: of `Snapshot.to_bytes`.
            judged_by: what will give scores; flows keep their worst score only if it gave the earlier ones too.

        Raises:
            StoreError: the content is damaged or of another kernel version.
        """
        stream = cls()
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                    raise ValueError("it would unpack to more than a stream can hold")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                if header["kernel"] != KERNEL_VERSION or header["features"] != list(FEATURES):
                    raise StoreError(
                        f"a checkpoint of kernel version {header['kernel']}, this is {KERNEL_VERSION}: "
                        "begin the stream anew"
                    )
                stream.seen, stream._begin, stream._clock = (int(header[key]) for key in ("seen", "begin", "clock"))
                stream._trust[:] = header["trust"]
                flows, endpoints, entities = (
                    _restored(arrays, kind, int(capacity))
                    for kind, capacity in zip(_TABLES, header["capacities"], strict=True)
                )
                numbered, same_judge = int(header["flows"]), header["judged_by"] == judged_by
        # The readers of these formats raise whatever they meet in a damaged file.
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"not a readable checkpoint of a stream ({error})") from error
        memory = stream._flows
        memory.keys, memory.flows = flows.keys, flows.arrays["flows"]
        memory.worst, memory.alarms = flows.arrays["worst"], flows.arrays["alarms"]
        if not same_judge:
            memory.worst[:], memory.alarms[:] = 0, 0
        memory.used = int(np.count_nonzero(flows.keys))
        stream._endpoints, stream._entities = endpoints, entities
        used = [int(np.count_nonzero(table.keys)) for table in (flows, endpoints, entities)]
        stream._used[:] = [*used, numbered]
        return stream


def _thinned(table: _Table, age: np.ndarray, lifetime: np.ndarray | int, most: int) -> _Table:
    """Drop rows past their lifetime; grow if the table is still more than half full; at `most`, drop the oldest."""
    capacity = len(table.keys)
    keep = (table.keys != 0) & (age <= lifetime)
    if keep.sum() * 2 > capacity:
        capacity = min(capacity * 2, most)
    shorter = np.asarray(lifetime)
    while keep.sum() * 2 > capacity:
        shorter = np.where(shorter > 0, shorter // 2, -1)
        keep &= age <= shorter
    return table.rebuilt(keep, capacity)


def _restored(arrays: np.lib.npyio.NpzFile, kind: str, capacity: int) -> _Table:
    """A table of a checkpoint; compiled code trusts its shape, so anything else than what `save` writes is refused."""
    shapes, most = _TABLES[kind]
    keys = arrays[f"{kind}_keys"]
    compact = _Table(keys, {name: arrays[f"{kind}_{name}"] for name in shapes})
    sound = (
        keys.dtype == np.uint64
        and keys.ndim == 1
        and len(np.unique(keys)) == len(keys)
        and not (keys == 0).any()
        and len(keys) < capacity <= most
        and capacity & (capacity - 1) == 0
        and all(
            compact.arrays[name].shape == (len(keys), *shape) and compact.arrays[name].dtype == dtype
            for name, (shape, dtype) in shapes.items()
        )
    )
    if not sound:
        raise ValueError(f"its table of {kind} keys is not what was saved")
    return compact.rebuilt(np.ones(len(keys), bool), capacity)
