"""Exchanges: which flows record the same real conversation.

Address translation and two vantage points record one conversation as several flows (*twins*), and a meter can report
the *reply* as a flow of its own. A source that does not know its exchanges gets them by the rule `EXCHANGE_RULE`:

1. *Orientation.* Of a flow's two endpoints (address, port) the one that more flows of the recording have is the
   service, the other one the client; at a tie the destination is the service.
2. *Reply.* Two flows between the same endpoints in opposite directions, at most `REPLY_SECONDS` apart, are linked.
3. *Destination twins.* The same client endpoint with another service endpoint in the same direction, at most one tick
   apart, is the same conversation before and after the service address was translated. A run of such flows is
   linked in groups of at most `MOST_VIEWS`.
4. *Source twins.* Where the client's address was translated, only tick, direction, bytes (within `BYTES_TOLERANCE`,
   translation can change the frame) and duration are left to compare. First the edges (client address, service
   endpoint) that record the same conversations are found. Of the smaller edge `SHARE` of the flows must have a
   partner in the other one. Edges to the same service need two such flows besides, and that the larger
   edge is explained by its partners to the same share (it is the node's), or long durations that are equal to a tenth
   of a millisecond in a quarter of the pairs. Edges to different services (both ends translated: a NodePort) need
   `EVIDENCE` pairs of equal bytes whose durations are equal to a hundredth. Then the flows of such edges are matched
   one to one within a tick: equal bytes first, nearest durations first, at last whatever is left with like bytes.

Every link joins one flow with one other, so a steady stream of identical probes or a flood stays as many exchanges as
it has conversations. Flows without ports (ICMP) are exchanges of their own.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flowsentry.flows.schema import TICK_SECONDS

EXCHANGE_RULE: Final = "exchanges/1"
REPLY_SECONDS: Final = 60
MOST_VIEWS: Final = 4
BYTES_TOLERANCE: Final = 0.05
SHARE: Final = 0.6
EVIDENCE: Final = 20

_MICROSECONDS: Final = 1_000_000
_JITTER: Final = 100_000
"""Nanoseconds by which the durations of twins may always differ: the path between the two views."""
_LONG: Final = 100_000_000
"""Nanoseconds from which a duration that is equal to a thousandth is evidence by itself."""
_NEIGHBOURS: Final = 3
_ROUNDS: Final = 50
_ANY: Final = 1_000
"""Multiple of the usual difference of durations that no two flows of one tick and the same edges fail on."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class _Flows(NamedTuple):
    """The columns that the rule needs, one element per flow, all int64 codes or units of the schema."""

    recording: Ints
    transport: Ints
    client: Ints
    client_address: Ints
    service: Ints
    edge: Ints
    forward: Ints
    ported: Bools
    time: Ints
    tick: Ints
    bytes: Ints
    duration: Ints


def find(flows: pd.DataFrame) -> Ints:
    """Number the exchanges of a flow table.

    Args:
        flows: one row per flow, canonical columns.

    Returns:
        int64 [n]: the exchange of each row, 0.. in order of first appearance.
    """
    if flows.empty:
        return np.zeros(0, np.int64)
    columns = _columns(flows)
    links = [_replies(columns), _destination_twins(columns), _source_twins(columns)]
    one, other = (np.concatenate(side) for side in zip(*links, strict=True))
    graph = coo_array((np.ones(one.size, bool), (one, other)), shape=(len(flows), len(flows)))
    components = connected_components(graph, directed=False)[1]
    return np.asarray(pd.factorize(components)[0], np.int64)


def _codes(*keys: Ints) -> Ints:
    """One dense code for each distinct combination of the keys."""
    code = np.zeros(keys[0].size, np.int64)
    for key in keys:
        values, distinct = pd.factorize(key)
        code = np.asarray(pd.factorize(code * max(len(distinct), 1) + values)[0], np.int64)
    return code


def _columns(flows: pd.DataFrame) -> _Flows:
    count = len(flows)
    recording = pd.factorize(flows["recording"])[0].astype(np.int64)
    transport = pd.factorize(flows["transport"])[0].astype(np.int64)
    addresses = pd.concat([flows["src_ip"].astype(str), flows["dst_ip"].astype(str)])
    address = pd.factorize(addresses)[0].astype(np.int64)
    ports = pd.concat([flows["src_port"], flows["dst_port"]]).fillna(-1).to_numpy(np.int64)
    endpoint = _codes(np.tile(recording, 2), np.tile(transport, 2), address, ports)
    popularity = np.bincount(endpoint)[endpoint]
    forward = popularity[count:] >= popularity[:count]
    client = np.where(forward, endpoint[:count], endpoint[count:])
    service = np.where(forward, endpoint[count:], endpoint[:count])
    client_address = np.where(forward, address[:count], address[count:])
    time = flows["time"].dt.as_unit("us").astype("int64").to_numpy()
    return _Flows(
        recording=recording,
        transport=transport,
        client=client,
        client_address=client_address,
        service=service,
        edge=_codes(client_address, service),
        forward=forward.astype(np.int64),
        ported=(ports[:count] >= 0) & (ports[count:] >= 0),
        time=time,
        tick=time // (TICK_SECONDS * _MICROSECONDS),
        bytes=flows["bytes"].to_numpy(np.int64),
        duration=flows["duration"].to_numpy(np.int64),
    )


def _replies(flows: _Flows) -> tuple[Ints, Ints]:
    source = np.where(flows.forward, flows.client, flows.service)
    ends = np.minimum(flows.client, flows.service), np.maximum(flows.client, flows.service)
    order = np.lexsort((flows.time, *ends))
    order = order[flows.ported[order]]
    one, other = order[:-1], order[1:]
    hit = (
        (ends[0][one] == ends[0][other])
        & (ends[1][one] == ends[1][other])
        & (source[one] != source[other])
        & (flows.time[other] - flows.time[one] <= REPLY_SECONDS * _MICROSECONDS)
    )
    hit = _first_of_each_chain(hit)
    return one[hit], other[hit]


def _first_of_each_chain(hit: Bools) -> Bools:
    """Of consecutive links keep every other one, so that no element has two."""
    position = np.arange(hit.size)
    start = np.maximum.accumulate(np.where(hit, -1, position))
    return np.asarray(hit & ((position - start) % 2 == 1))


def _destination_twins(flows: _Flows) -> tuple[Ints, Ints]:
    order = np.lexsort((flows.service, flows.time, flows.forward, flows.client))
    order = order[flows.ported[order]]
    one, other = order[:-1], order[1:]
    hit = (
        (flows.client[one] == flows.client[other])
        & (flows.forward[one] == flows.forward[other])
        & (flows.service[one] != flows.service[other])
        & (flows.time[other] - flows.time[one] <= TICK_SECONDS * _MICROSECONDS)
    )
    position = np.arange(hit.size)
    start = np.maximum.accumulate(np.where(hit, -1, position))
    hit &= (position - start) % MOST_VIEWS != 0
    return one[hit], other[hit]


def _source_twins(flows: _Flows) -> tuple[Ints, Ints]:
    same_service = _edge_pairs(flows, *_candidates(flows, same_service=True), same_service=True)
    both = _edge_pairs(flows, *_candidates(flows, same_service=False), same_service=False)
    return _match(flows, np.concatenate([same_service, both]))


def _candidates(flows: _Flows, *, same_service: bool) -> tuple[Ints, Ints]:
    """Pairs of flows of different edges that are near in the order of duration within the same tick."""
    rows = np.flatnonzero(flows.ported & (same_service | (flows.duration > 0)))
    kind = flows.service if same_service else flows.bytes
    block = _codes(flows.recording, flows.transport, flows.tick, flows.forward, kind)
    # Flows of equal duration are interleaved by edge, else the twins of a long tie are never neighbours.
    turn = _turn(block[rows], flows.duration[rows], flows.edge[rows])
    order = rows[np.lexsort((flows.edge[rows], turn, flows.duration[rows], block[rows]))]
    ones, others = [], []
    for step in range(1, _NEIGHBOURS + 1):
        one, other = order[:-step], order[step:]
        hit = (block[one] == block[other]) & (flows.client_address[one] != flows.client_address[other])
        difference = flows.duration[other] - flows.duration[one]
        if same_service:
            hit &= _near_bytes(flows, one, other) & (difference <= _slack(flows.duration[one]))
        else:
            hit &= (flows.service[one] != flows.service[other]) & (difference * 100 <= flows.duration[one])
        ones.append(one[hit])
        others.append(other[hit])
    return np.concatenate(ones), np.concatenate(others)


def _turn(*keys: Ints) -> Ints:
    """The how-manieth row of its combination of keys each row is."""
    return np.asarray(pd.Series(np.zeros(keys[0].size)).groupby(_codes(*keys)).cumcount(), np.int64)


def _near_bytes(flows: _Flows, one: Ints, other: Ints) -> Bools:
    smaller = np.minimum(flows.bytes[one], flows.bytes[other])
    return np.asarray(abs(flows.bytes[one] - flows.bytes[other]) <= BYTES_TOLERANCE * smaller)


def _slack(duration: Ints) -> Ints:
    return np.asarray(np.maximum(_JITTER, duration // 20))


def _edge_pairs(flows: _Flows, one: Ints, other: Ints, *, same_service: bool) -> Ints:
    """Pairs of edges [k x 2] whose flows have enough partners in each other."""
    if one.size == 0:
        return np.zeros((0, 2), np.int64)
    swap = flows.edge[one] > flows.edge[other]
    low, high = np.where(swap, other, one), np.where(swap, one, other)
    difference = abs(flows.duration[low] - flows.duration[high])
    telling = (flows.duration[low] >= _LONG) & (difference <= _JITTER)
    pairs = pd.DataFrame({"a": flows.edge[low], "b": flows.edge[high], "low": low, "high": high, "telling": telling})
    found = pairs.groupby(["a", "b"], sort=False).agg(
        low=("low", "nunique"), high=("high", "nunique"), telling=("telling", "sum")
    )
    edges = np.asarray(found.index.to_frame().to_numpy(np.int64))
    counted = flows.ported & (same_service | (flows.duration > 0))
    size = np.asarray(np.bincount(flows.edge[counted], minlength=flows.edge.max() + 1), np.int64)
    matched = np.asarray(found[["low", "high"]].min(axis=1), np.int64)
    paired = matched >= SHARE * size[edges].min(axis=1)
    if not same_service:
        return np.asarray(edges[paired & (matched >= EVIDENCE)])
    explained = np.zeros(size.size, np.int64)
    np.add.at(explained, edges[paired].ravel(), matched[paired].repeat(2))
    translated = (explained[edges] >= SHARE * size[edges]) & (size[edges] >= size[edges].max(axis=1, keepdims=True))
    told = 4 * found["telling"].to_numpy() >= matched
    return np.asarray(edges[paired & (told | ((matched >= 2) & translated.any(axis=1)))])


def _match(flows: _Flows, edge_pairs: Ints) -> tuple[Ints, Ints]:
    """Match the flows of accepted pairs of edges one to one: equal bytes first, then nearest durations."""
    ones, others = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    if edge_pairs.size == 0:
        return ones[0], others[0]
    by_edge = np.argsort(flows.edge, kind="stable")
    bounds = np.searchsorted(flows.edge[by_edge], np.arange(flows.edge.max() + 2))
    sides = [[by_edge[bounds[e] : bounds[e + 1]] for e in pair] for pair in edge_pairs]
    rows = np.concatenate([side for pair in sides for side in pair])
    pair = np.repeat(np.arange(len(sides)), [left.size + right.size for left, right in sides])
    block = _codes(pair, flows.tick[rows], flows.forward[rows])
    equal_bytes = _codes(block, flows.bytes[rows])
    free = flows.ported.copy()
    for within, slack in ((equal_bytes, 1), (block, 1), (equal_bytes, _ANY), (block, _ANY)):
        for _ in range(_ROUNDS):
            one, other = _mutual_neighbours(flows, rows, within, free, slack)
            free[one] = free[other] = False
            ones.append(one)
            others.append(other)
            if one.size == 0:
                break
    return np.concatenate(ones), np.concatenate(others)


def _mutual_neighbours(flows: _Flows, rows: Ints, block: Ints, free: Bools, slack: int) -> tuple[Ints, Ints]:
    left = np.flatnonzero(free[rows])
    duration, edge = flows.duration[rows], flows.edge[rows]
    turn = _turn(block[left], duration[left], edge[left])
    order = left[np.lexsort((edge[left], turn, duration[left], block[left]))]
    a, b = order[:-1], order[1:]
    difference = duration[b] - duration[a]
    fits = (
        (block[a] == block[b])
        & (edge[a] != edge[b])
        & _near_bytes(flows, rows[a], rows[b])
        & (difference <= slack * _slack(duration[a]))
    )
    nearest = np.argsort(difference[fits], kind="stable")
    return _one_to_one(rows[a[fits]][nearest], rows[b[fits]][nearest])


def _one_to_one(one: Ints, other: Ints) -> tuple[Ints, Ints]:
    """Of pairs in order of preference keep those that are the first choice of both of their flows."""
    first = np.full(max(one.max(initial=-1), other.max(initial=-1)) + 1, one.size)
    rank = np.arange(one.size)
    np.minimum.at(first, one, rank)
    np.minimum.at(first, other, rank)
    keep = (first[one] == rank) & (first[other] == rank)
    return one[keep], other[keep]
