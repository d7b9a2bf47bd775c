"""From exchanges to flows: what passes the meters' wires, with twins and replies."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from flowsentry.simulation.exchanges import EGRESS, NODE_PORT, SERVICE
from flowsentry.simulation.world import SECOND, Integers, World

FORWARD: Final = 0
TWIN: Final = 1
REPLY: Final = 2
ROLES: Final = ("forward", "twin", "reply")

FIRST_PORT: Final = 32_768
LAST_PORT: Final = 60_999
REUSE_AFTER: Final = 61 * SECOND
"""A meter has closed a flow this long after its end, so that its ports may come again."""
TRIES: Final = 4
"""How often a port is chosen again for an exchange whose port is not free; then the client gives up."""


def pass_wires(world: World, exchanges: pd.DataFrame, end: int, rng: np.random.Generator) -> pd.DataFrame:
    """Turn exchanges into the flows that meters can see.

    A translated exchange that is seen twice becomes two flows (twins), an answer that is reported as a flow of its
    own leaves its request with one direction, and in swapped flows the server is the source.

    Args:
        world: who there is.
        exchanges: table of `exchanges.COLUMNS`.
        end: end of the recording, microseconds; later exchanges are left out.
        rng: source of randomness.

    Returns:
        One row per flow, ordered by start: `src`, `dst`, `src_port`, `dst_port`, `transport`, `start` (microseconds),
        `duration` (ns), `src_bytes`, `dst_bytes`, `src_packets`, `dst_packets`, `node`, `role`, `exchange`, and the
        exchange's `family`, `hard_negative`, `episode`.
    """
    exchanges = exchanges[exchanges["start"].between(0, end - 1)]
    exchanges = exchanges.sort_values("start", kind="stable", ignore_index=True)
    exchanges["nat_port"] = rng.integers(FIRST_PORT, LAST_PORT + 1, len(exchanges))
    ephemeral = exchanges["client_port"].eq(-1).to_numpy()
    exchanges.loc[ephemeral, "client_port"] = _ports_in_turn(
        exchanges["client"].to_numpy()[ephemeral], exchanges["start"].to_numpy()[ephemeral], rng
    )
    for _ in range(TRIES):
        flows = _flows(world, exchanges)
        clash = np.unique(flows["exchange"].to_numpy()[_clashes(flows)])
        if not len(clash):
            return flows
        for name in ("client_port", "nat_port"):
            exchanges.loc[clash, name] = rng.integers(FIRST_PORT, LAST_PORT + 1, len(clash))
    return _flows(world, exchanges[~exchanges.index.isin(clash)].reset_index(drop=True))


def _ports_in_turn(client: Integers, start: Integers, rng: np.random.Generator) -> Integers:
    """Every client goes through the even ephemeral ports, as Linux does, from anywhere.

    The steps are irregular, and as long as a busy client does not come round before its flows are closed.
    """
    ports = (LAST_PORT - FIRST_PORT + 1) // 2
    busy = np.zeros(int(client.max(initial=0)) + 1, np.int64)
    spans, counts = np.unique(client * 2**32 + start // (2 * REUSE_AFTER), return_counts=True)
    np.maximum.at(busy, spans // 2**32, counts)
    longest = np.clip(ports // np.maximum(busy, 1) - 1, 1, 20)
    order = np.argsort(client, kind="stable")
    mine = client[order]
    steps = np.cumsum(1 + np.floor(rng.random(len(client)) * longest[mine]).astype(np.int64))
    steps -= steps[np.searchsorted(mine, mine)]
    chosen = np.empty(len(client), np.int64)
    chosen[order] = FIRST_PORT + 2 * ((mine * 7_919 + int(rng.integers(ports)) + steps) % ports)
    return chosen


def _flows(world: World, exchanges: pd.DataFrame) -> pd.DataFrame:
    forward = pd.DataFrame(
        {
            "src": exchanges["client"],
            "src_port": exchanges["client_port"],
            "dst": exchanges["dialled"],
            "dst_port": exchanges["port"],
            "transport": exchanges["transport"],
            **{name: exchanges[name] for name in ("start", "duration", "src_bytes", "dst_bytes")},
            **{name: exchanges[name] for name in ("src_packets", "dst_packets", "replied", "swapped")},
            "role": np.int8(FORWARD),
            "exchange": exchanges.index.to_numpy(np.int64),
            **{name: exchanges[name] for name in ("family", "hard_negative", "episode")},
        }
    )
    node = world.node_of[forward["src"]]
    forward["node"] = np.where(node >= 0, node, np.maximum(world.node_of[exchanges["server"]], 0))
    twins = _twins(world, forward, exchanges)
    seen = pd.concat([forward, twins], ignore_index=True)
    answers = seen["replied"] & (seen["dst_packets"] > 0) & (seen["src_packets"] > 0)
    replies = _swap(seen[answers], np.ones(int(answers.sum()), bool)).assign(role=np.int8(REPLY))
    replies["start"] += np.minimum(replies["duration"] // 10_000, 200)
    replies["duration"] -= replies["duration"] // 10
    replies[["dst_bytes", "dst_packets"]] = 0
    seen.loc[answers, ["dst_bytes", "dst_packets"]] = 0
    seen = _swap(seen, seen["swapped"].to_numpy(bool) & ~answers.to_numpy(bool))
    flows = pd.concat([seen, replies], ignore_index=True).drop(columns=["replied", "swapped"])
    order = np.lexsort((flows["role"], flows["exchange"], flows["start"]))
    return flows.iloc[order].reset_index(drop=True)


def _twins(world: World, forward: pd.DataFrame, exchanges: pd.DataFrame) -> pd.DataFrame:
    """The flows on the other side of the translations."""
    twice = (exchanges["seen_twice"] & exchanges["nat"].isin([SERVICE, NODE_PORT, EGRESS])).to_numpy()
    twins = forward[twice].copy()
    exchanges = exchanges[twice]
    nat = exchanges["nat"].to_numpy()
    translated = nat != EGRESS
    twins["dst"] = np.where(translated, exchanges["server"], twins["dst"])
    twins["dst_port"] = np.where(translated, exchanges["server_port"], twins["dst_port"])
    masked = nat != SERVICE
    gateway = np.where(nat == NODE_PORT, exchanges["dialled"], world.nodes[twins["node"]])
    twins["src"] = np.where(masked, gateway, twins["src"])
    twins["src_port"] = np.where(masked, exchanges["nat_port"], twins["src_port"])
    twins["role"] = np.int8(TWIN)
    twins["start"] += 3
    return twins


def _swap(flows: pd.DataFrame, which: np.ndarray) -> pd.DataFrame:
    """Exchange source and destination of the flows chosen."""
    swapped = flows.copy()
    for ours, theirs in (
        ("src", "dst"),
        ("src_port", "dst_port"),
        ("src_bytes", "dst_bytes"),
        ("src_packets", "dst_packets"),
    ):
        swapped[ours] = np.where(which, flows[theirs], flows[ours])
        swapped[theirs] = np.where(which, flows[ours], flows[theirs])
    return swapped


def _clashes(flows: pd.DataFrame) -> np.ndarray:
    """Bool array: a flow with the same endpoints begins before an earlier one is closed."""
    ends = flows["src"].to_numpy() * 65_536 + flows["src_port"].to_numpy()
    others = flows["dst"].to_numpy() * 65_536 + flows["dst_port"].to_numpy()
    start = flows["start"].to_numpy()
    order = np.lexsort((start, flows["transport"], others, ends))
    fresh = np.ones(len(flows), bool)
    keys = np.column_stack([ends, others, flows["transport"]])[order]
    fresh[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    closed = (start + flows["duration"].to_numpy() // 1000)[order] + REUSE_AFTER
    group = np.cumsum(fresh)
    span = int(closed.max(initial=0)) + 1
    latest = np.maximum.accumulate(closed + group * span) - group * span
    clash = np.zeros(len(flows), bool)
    clash[order[1:]] = ~fresh[1:] & (start[order][1:] < latest[:-1])
    return clash
