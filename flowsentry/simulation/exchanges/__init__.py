"""Exchanges: real conversations, before anything sees them. One row each, in a table of `COLUMNS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from flowsentry.simulation.world import SECOND, Integers

TCP: Final = 6
UDP: Final = 17

DIRECT: Final = 0
SERVICE: Final = 1
"""The client sends to a service address, translated to a pod's."""
NODE_PORT: Final = 2
"""The client sends to a port of a node, translated to a pod's; the pod sees the node as the source."""
EGRESS: Final = 3
"""A pod sends to the world outside, which sees the node as the source."""

ANSWERED: Final = 0
REFUSED: Final = 1
UNANSWERED: Final = 2
RESET: Final = 3

MILLISECOND: Final = 1_000_000
"""Durations are nanoseconds."""

SYN, RST, PADDED_RST = 74, 54, 60
"""Sizes of packets without payload over IPv4, bytes with the Ethernet header."""
FULL: Final = 1_440
"""Most bytes of a packet, on average."""

COLUMNS: Final[Mapping[str, tuple[str, int | None]]] = {
    "client": ("int64", None),  # who begins
    "dialled": ("int64", None),  # address and port that the client sends to
    "port": ("int64", None),
    "server": ("int64", None),  # address and port behind the translation
    "server_port": ("int64", None),
    "transport": ("int8", TCP),
    "nat": ("int8", DIRECT),
    "outcome": ("int8", ANSWERED),
    "start": ("int64", None),  # microseconds since the recording began
    "duration": ("int64", None),  # nanoseconds
    "src_bytes": ("int64", None),  # from client to server
    "dst_bytes": ("int64", None),
    "src_packets": ("int64", None),
    "dst_packets": ("int64", None),
    "seen_twice": ("bool", 0),  # both sides of the translation pass a meter
    "replied": ("bool", 0),  # the meter reports the answer as a flow of its own
    "swapped": ("bool", 0),  # the meter takes the server for the source
    "client_port": ("int64", -1),  # -1: ephemeral, chosen when all exchanges are known
    "family": ("int16", -1),  # number of the attack, of the hard negative, of the episode
    "hard_negative": ("int16", -1),
    "episode": ("int64", -1),
}


def table(n: int, **columns: ArrayLike) -> pd.DataFrame:
    """Make a table of `n` exchanges; what is not given has its default, scalars are repeated."""
    filled = {}
    for name, (dtype, default) in COLUMNS.items():
        value = columns.pop(name) if default is None else columns.pop(name, default)
        filled[name] = np.broadcast_to(np.asarray(value), (n,)).astype(dtype)
    if columns:
        raise KeyError(f"not a column of an exchange: {', '.join(columns)}")
    return pd.DataFrame(filled)


def join(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """All exchanges of several tables, in their order."""
    return pd.concat([table(0, **{name: [] for name in COLUMNS}), *tables], ignore_index=True)


class Quantiles:
    """A distribution of positive numbers with given quantiles, lognormal between them."""

    def __init__(self, **quantiles: float) -> None:
        """Take quantiles as `q05=..., q50=...`: at least two, increasing."""
        levels = [int(name[1:]) / 10 ** len(name[1:]) for name in quantiles]
        self._z = np.array([NormalDist().inv_cdf(level) for level in levels])
        self._log = np.log(np.array(list(quantiles.values())))

    def at(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values for standard normal scores; the outer pieces go on for half a unit beyond the outer quantiles."""
        low = self._log[0] - 0.5 * (self._log[1] - self._log[0]) / (self._z[1] - self._z[0])
        high = self._log[-1] + 0.5 * (self._log[-1] - self._log[-2]) / (self._z[-1] - self._z[-2])
        scores = np.concatenate([self._z[:1] - 0.5, self._z, self._z[-1:] + 0.5])
        logs = np.concatenate([[low], self._log, [high]])
        values: NDArray[np.float64] = np.exp(np.interp(z, scores, logs))
        return values


def answered(
    rng: np.random.Generator,
    n: int,
    total: Quantiles,
    milliseconds: Quantiles,
    *,
    src_share: float,
    correlation: float = 0.5,
    transport: int = TCP,
) -> dict[str, Integers]:
    """Sizes and durations of exchanges that took place.

    Args:
        rng: source of randomness.
        n: how many.
        total: bytes in both directions.
        milliseconds: duration.
        src_share: share of the bytes that the client sends, on average.
        correlation: between the normal scores of bytes and duration.
        transport: `TCP` or `UDP`.
    """
    z = rng.standard_normal((2, n))
    size = np.rint(total.at(z[0])).astype(np.int64)
    lasts = milliseconds.at(correlation * z[0] + np.sqrt(1 - correlation**2) * z[1])
    return sized(rng, size, src_share, transport) | {"duration": np.rint(lasts * MILLISECOND).astype(np.int64)}


def sized(rng: np.random.Generator, total: Integers, src_share: float, transport: int = TCP) -> dict[str, Integers]:
    """Packets and bytes by direction of exchanges with `total` bytes; up to 400 bytes of TCP carry no payload."""
    if transport == UDP:
        packets = 2 * np.maximum(1, np.rint(total / 274).astype(np.int64))
    else:
        with_payload = np.minimum(total // 100, 8 + total // 850)
        packets = np.where(total <= 400, np.maximum(2, -(-total // 80)), with_payload)
    src_packets = (packets + 1) // 2
    share = np.clip(src_share * rng.uniform(0.8, 1.2, len(total)), 0.02, 0.98)
    floor = RST * packets
    total = np.maximum(total, floor)
    no_payload = (transport == TCP) & (total <= 400)
    src_bytes = np.where(
        no_payload,
        np.rint(total * src_packets / packets),
        RST * src_packets + np.rint((total - floor) * share),
    ).astype(np.int64)
    return {
        "src_bytes": src_bytes,
        "dst_bytes": total - src_bytes,
        "src_packets": np.maximum(src_packets, -(-src_bytes // FULL)),
        "dst_packets": np.maximum(packets - src_packets, -(-(total - src_bytes) // FULL)),
    }


def refused(rng: np.random.Generator, n: int) -> dict[str, Integers]:
    """SYN, answered by RST at once."""
    one = np.ones(n, np.int64)
    return {
        "outcome": np.full(n, REFUSED),
        "src_bytes": SYN * one,
        "dst_bytes": rng.choice(np.array([RST, PADDED_RST]), n),
        "src_packets": one,
        "dst_packets": one,
        "duration": rng.integers(20_000, 120_000, n),
    }


def unanswered(rng: np.random.Generator, n: int, repeated: float) -> dict[str, Integers]:
    """SYN without an answer; the share `repeated` is sent again after 1 s, half of those also after 3 s."""
    again = (rng.random(n) < repeated).astype(np.int64)
    packets = 1 + again * (1 + rng.integers(0, 2, n))
    lasts = np.array([0, 0, 1_000, 3_000])[packets] * MILLISECOND
    return {
        "outcome": np.full(n, UNANSWERED),
        "src_bytes": SYN * packets,
        "dst_bytes": np.zeros(n, np.int64),
        "src_packets": packets,
        "dst_packets": np.zeros(n, np.int64),
        "duration": lasts + again * rng.integers(1_000_000, 30_000_000, n),
    }


def reset(rng: np.random.Generator, n: int) -> dict[str, Integers]:
    """SYN and SYN+ACK; the client resets."""
    one = np.ones(n, np.int64)
    return {
        "outcome": np.full(n, RESET),
        "src_bytes": (SYN + RST) * one,
        "dst_bytes": SYN * one,
        "src_packets": 2 * one,
        "dst_packets": one,
        "duration": rng.integers(50_000, 400_000, n),
    }


def spread(rng: np.random.Generator, n: int, start: int, end: int) -> Integers:
    """`n` sorted times in start..end, microseconds."""
    return np.sort(rng.integers(start, max(end, start + 1), n))


def mixed(
    rng: np.random.Generator, kinds: Sequence[dict[str, Integers]], shares: Sequence[float]
) -> dict[str, Integers]:
    """For every exchange one of several equally long kinds, with the given shares."""
    names = sorted({name for kind in kinds for name in kind})
    n = len(next(iter(kinds[0].values())))
    chosen = rng.choice(len(kinds), n, p=np.asarray(shares))
    zeros = np.zeros(n, np.int64)
    return {name: np.choose(chosen, [kind.get(name, zeros) for kind in kinds]) for name in names}


def seconds(value: float) -> int:
    """Seconds as the simulator's microseconds."""
    return round(value * SECOND)
