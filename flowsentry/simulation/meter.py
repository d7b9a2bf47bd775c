"""What a meter such as Packetbeat reports of the flows that pass it.

Each node has a meter. Every 10 s, with some ticks missing, it reports the flows whose packets it has seen since its
last report; 30 s after a flow's last packet the next tick reports it once more, as final. (Packetbeat also repeats
flows that wait for their end; such reports say nothing new and are left out.)
"""

from __future__ import annotations

import base64
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.flows.schema import TICK_SECONDS
from flowsentry.simulation.world import NODES, SECOND, Integers, World

TIMEOUT: Final = 30 * SECOND
MISSING: Final = 0.45
"""Chance that a tick is left out; never two in a row."""
ID_HEADER: Final = bytes.fromhex("1004ffffffff00ffffffffffff08ff0000")


def observe(world: World, flows: pd.DataFrame, end: int, rng: np.random.Generator) -> pd.DataFrame:
    """Report flows.

    Args:
        world: who there is.
        flows: as `flows.pass_wires` gives them.
        end: end of the recording, microseconds; nothing is reported after it, open flows stay open.
        rng: source of randomness.

    Returns:
        One row per report in arrival order: `position` (of the flow), `time` (microseconds, whole milliseconds),
        `final`, `duration` (ns), `src_bytes`, `dst_bytes`, `src_packets`, `dst_packets` so far.
    """
    parts = [
        _of_node(flows, np.flatnonzero(flows["node"].to_numpy() == node), _ticks(node, end, rng))
        for node in range(NODES)
    ]
    reports = pd.concat(parts, ignore_index=True)
    order = np.lexsort((reports["position"], reports["time"]))
    return reports.iloc[order].reset_index(drop=True)


def _ticks(node: int, end: int, rng: np.random.Generator) -> Integers:
    """Times of a node's reports: the first within 13 ms of the whole tick, the others 90 to 300 ms late."""
    count = end // (TICK_SECONDS * SECOND)
    gaps = 1 + (rng.random(count) < MISSING)
    ticks = np.cumsum(gaps)
    ticks = ticks[ticks <= count]
    low, high = ((0, 13), (90, 190), (200, 300))[node]
    times = ticks * TICK_SECONDS * SECOND + rng.integers(low, high + 1, len(ticks)) * 1_000
    return times[times < end]


def _of_node(flows: pd.DataFrame, mine: Integers, ticks: Integers) -> pd.DataFrame:
    start = flows["start"].to_numpy()[mine]
    lasts = flows["duration"].to_numpy()[mine]
    last_packet = start + -(-lasts // 1_000)
    first = np.searchsorted(ticks, start, side="right")
    complete = np.searchsorted(ticks, last_packet, side="left").clip(min=first)
    closed = np.searchsorted(ticks, last_packet + TIMEOUT, side="right")
    # the final report takes the place of the complete one where a gap leaves none before it
    counts = np.where(closed > complete, complete - first + 2, closed - first + 1)
    flow = np.repeat(np.arange(len(mine)), counts)
    nth = np.arange(len(flow)) - np.repeat(np.cumsum(counts) - counts, counts)
    final = nth == counts[flow] - 1
    tick = np.where(final, closed[flow], first[flow] + nth)
    seen = tick < len(ticks)
    flow, final, tick = flow[seen], final[seen], tick[seen]
    time = ticks[tick]
    duration = np.minimum((time - start[flow]) * 1_000, lasts[flow])
    share = np.where(duration < lasts[flow], duration / np.maximum(lasts[flow], 1), 1.0)
    reports = {"position": mine[flow], "time": time, "final": final, "duration": duration}
    for side in ("src", "dst"):
        packets = flows[f"{side}_packets"].to_numpy()[mine][flow]
        size = flows[f"{side}_bytes"].to_numpy()[mine][flow]
        so_far = np.minimum(1 + np.floor((packets - 1) * share).astype(np.int64), packets)
        reports[f"{side}_packets"] = so_far
        reports[f"{side}_bytes"] = np.where(
            so_far == packets, size, np.rint(size * (so_far / np.maximum(packets, 1))).astype(np.int64)
        )
    return pd.DataFrame(reports)


def flow_ids(world: World, flows: pd.DataFrame) -> list[str]:
    """Packetbeat's ids: a header, both addresses and both ports in base64, so that equal endpoints have equal ids."""
    octets = np.array([_octets(address) for address in world.addresses], np.uint8)
    n = len(flows)
    raw = np.zeros((n, 30), np.uint8)
    raw[:, :17] = np.frombuffer(ID_HEADER, np.uint8)
    raw[:, 16] = flows["transport"]
    raw[:, 17:21] = octets[flows["src"]]
    raw[:, 21:25] = octets[flows["dst"]]
    for column, at in (("src_port", 25), ("dst_port", 27)):
        port = flows[column].to_numpy()
        raw[:, at] = port % 256
        raw[:, at + 1] = port // 256
    text = base64.b64encode(raw.tobytes()).decode("ascii")
    return [text[40 * row : 40 * row + 39] for row in range(n)]


def _octets(address: str) -> list[int]:
    return [0, 0, 0, 0] if address == "::" else [int(part) for part in address.split(".")]
