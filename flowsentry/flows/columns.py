"""Reports as plain arrays: what the window kernel reads, whether they come from a table or from a request.

A flow *carried nothing* if it is TCP and its packets had room for headers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.flows.hashing import hash_text

NO_PAYLOAD_BYTES: Final = 400
"""A TCP flow up to this size carried nothing, where the source does not count packets: on the recording of February
2022 recall is flat from 400 to 700 bytes."""
HEADER_BYTES: Final = 80
"""A TCP flow with at most this many bytes a packet carried nothing, where the source counts packets: a SYN with
options in an Ethernet frame has 74 to 78."""
IPV6_BYTES: Final = 20
"""How much longer the header of IPv6 is."""

TCP: Final = 6
TRANSPORT_NUMBERS: Final = {"tcp": TCP, "udp": 17, "icmp": 1, "ipv6-icmp": 58, "sctp": 132}
OTHER_TRANSPORT: Final = 255


@dataclass(frozen=True)
class Columns:
    """Reports in arrival order; every array has the shape [reports]."""

    time: np.ndarray
    """int64, ms since 1970, as reported."""
    flow_id: np.ndarray
    """uint64, hash (`hash_text`)."""
    src_ip: np.ndarray
    """uint64, hash of the text."""
    dst_ip: np.ndarray
    """uint64, hash of the text."""
    final: np.ndarray
    """bool."""
    src_port: np.ndarray
    """int64, 0 where missing."""
    dst_port: np.ndarray
    """int64, 0 where missing."""
    transport: np.ndarray
    """int64, see `transport_number`."""
    bytes: np.ndarray
    """int64."""
    duration: np.ndarray
    """int64, ns."""
    payload: np.ndarray
    """bool, False for a flow that carried nothing so far."""
    table: Callable[[], pd.DataFrame]
    """The canonical table of the same reports: the view `paper` reads names and addresses."""

    def __len__(self) -> int:
        return len(self.time)

    @classmethod
    def of(cls, reports: pd.DataFrame) -> Columns:
        """The arrays of a canonical table."""
        numbers = [transport_number(str(name)) for name in reports["transport"].cat.categories]
        transport = np.array([*numbers, 0], np.int64)[reports["transport"].cat.codes.to_numpy()]
        sizes = reports["bytes"].to_numpy(np.int64)
        packets = ipv6 = None
        if "packets" in reports:
            sources = reports["src_ip"].cat
            packets = reports["packets"].fillna(-1).to_numpy(np.int64)
            ipv6 = np.array([*(":" in str(address) for address in sources.categories), False])[sources.codes.to_numpy()]
        return cls(
            time=reports["time"].dt.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64),
            flow_id=hash_text(reports["flow_id"]),
            src_ip=hash_text(reports["src_ip"]),
            dst_ip=hash_text(reports["dst_ip"]),
            final=reports["final"].to_numpy(bool),
            src_port=reports["src_port"].fillna(0).to_numpy(np.int64),
            dst_port=reports["dst_port"].fillna(0).to_numpy(np.int64),
            transport=transport,
            bytes=sizes,
            duration=reports["duration"].to_numpy(np.int64),
            payload=has_payload(transport, sizes, packets, ipv6),
            table=lambda: reports,
        )


def transport_number(name: str | None) -> int:
    """IANA protocol number where known, 255 for other names, 0 where missing."""
    return 0 if name is None else TRANSPORT_NUMBERS.get(name.lower(), OTHER_TRANSPORT)


def has_payload(
    transport: np.ndarray, sizes: np.ndarray, packets: np.ndarray | None = None, ipv6: np.ndarray | None = None
) -> np.ndarray:
    """Bool [reports]: False for TCP flows that carried nothing so far; other transports always count as answered.

    Args:
        transport: numbers.
        sizes: bytes of both directions.
        packets: of both directions, -1 where the source does not say.
        ipv6: whether the addresses are IPv6; needed with `packets`.
    """
    most: np.ndarray | int = NO_PAYLOAD_BYTES
    if packets is not None:
        most = np.where(packets >= 0, (HEADER_BYTES + IPV6_BYTES * np.asarray(ipv6)) * packets, most)
    return np.asarray((transport != TCP) | (sizes > most))
