"""The canonical schema of reports and flows: names, dtypes, units. Every source produces it, everything else reads it.

A *report* is one record about a flow. Reports are kept in a pandas table, one row each, in arrival order within
their recording; recordings follow one another. A *flow table* has one row per flow (its last report), its index is
the flow's number, and it has the same columns.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pandas as pd

BENIGN: Final = "benign"
MALICIOUS: Final = "malicious"

TICK_SECONDS: Final = 10
"""Reporting period of the meter (Packetbeat's default), seconds."""

TRANSPORTS: Final = (
    *("tcp", "udp", "icmp", "ipv6-icmp", "icmpv6", "icmp6", "sctp", "dccp", "udplite"),
    *("igmp", "gre", "esp", "ah", "ipip", "ipv6", "ospf", "pim", "vrrp", "l2tp"),
)
"""Names of transport protocols that a report may have."""
MAX_PORT: Final = 65_535
MAX_COUNT: Final = 2**53
"""Bytes and packets above this are a broken counter: 9 petabytes in one flow, and no longer exact as a float."""
MAX_DURATION_NS: Final = 10 * 365 * 86_400 * 10**9
MAX_ADDRESS_LENGTH: Final = 64
"""Characters of the longest address, an IPv6 with the name of its interface."""


@dataclass(frozen=True)
class Column:
    """One column of the canonical schema."""

    name: str
    dtype: str
    unit: str
    description: str
    presence: Literal["always", "source", "truth", "derived"]
    """always: every source gives it; source: only where the source has it; truth: only where the source knows the
    attacks (simulation) or a rule derives them; derived: added by FlowSentry after validation."""


TIME_DTYPE: Final = "datetime64[us, UTC]"

SCHEMA: Final = (
    Column("recording", "category", "", "capture that the report belongs to", "always"),
    Column("file", "category", "", "name of the file that the report was read from", "always"),
    Column("row", "int64", "", "number of the data row in its file, the first is 1", "always"),
    Column("flow_id", "string[pyarrow]", "", "the meter's id; comes again when ports are reused", "always"),
    Column("final", "bool", "", "the meter says that this is the flow's last report", "always"),
    Column("src_ip", "category", "", "source address; the meter's source is not always the initiator", "always"),
    Column("dst_ip", "category", "", "destination address", "always"),
    Column("src_port", "Int32", "", "source port, 0..65535; missing for ICMP", "always"),
    Column("dst_port", "Int32", "", "destination port, 0..65535; missing for ICMP", "always"),
    Column("transport", "category", "", "tcp, udp, icmp, ...; may be missing", "always"),
    Column("bytes", "int64", "bytes", "bytes in both directions since the flow began", "always"),
    Column("time", TIME_DTYPE, "", "when the report was made", "always"),
    Column("duration", "int64", "ns", "time since the flow began", "always"),
    Column("label", "category", "", "benign or malicious, as published; missing where unlabelled", "always"),
    Column("packets", "Int64", "packets", "packets in both directions", "source"),
    Column("start", TIME_DTYPE, "", "first packet", "source"),
    Column("end", TIME_DTYPE, "", "last packet so far", "source"),
    Column("src_bytes", "Int64", "bytes", "bytes from source to destination", "source"),
    Column("dst_bytes", "Int64", "bytes", "bytes from destination to source", "source"),
    Column("src_packets", "Int64", "packets", "packets from source to destination", "source"),
    Column("dst_packets", "Int64", "packets", "packets from destination to source", "source"),
    Column("src_workload", "category", "", "workload (namespace/name) of the source address", "source"),
    Column("dst_workload", "category", "", "workload (namespace/name) of the destination address", "source"),
    Column("family", "category", "", "which attack; missing for benign flows", "truth"),
    Column("group", "category", "", "group of similar families, held out together; missing for benign", "truth"),
    Column(
        "exchange", "int64", "", "the real conversation; twins and replies share it; unique over recordings", "truth"
    ),
    Column("episode", "category", "", "one run of an attack or of a hard negative", "truth"),
    Column("role", "category", "", "forward, reply or twin", "truth"),
    Column("hard_negative", "category", "", "which benign trouble; missing elsewhere", "truth"),
    Column(
        "corrected", "category", "", "the label after the versioned corrections; equals label without any", "derived"
    ),
    Column("flow", "int64", "", "number of the flow, from 0, in order of first report", "derived"),
)
BY_NAME: Final = {column.name: column for column in SCHEMA}
REQUIRED: Final = tuple(column.name for column in SCHEMA if column.presence == "always")


def conform(table: pd.DataFrame) -> pd.DataFrame:
    """Order the known columns and give them their dtypes; missing required columns and unknown ones are errors.

    Args:
        table: at least the columns of `REQUIRED`.

    Returns:
        A table with the columns of `SCHEMA` that `table` has, in that order, with a fresh `RangeIndex`.

    Raises:
        KeyError: a required column is missing, or a column is not part of the schema.
    """
    missing = [name for name in REQUIRED if name not in table]
    unknown = [name for name in table.columns if name not in BY_NAME]
    if missing or unknown:
        raise KeyError(f"not the canonical schema: missing {missing}, unknown {unknown}")
    columns = {c.name: table[c.name].astype(pd.api.types.pandas_dtype(c.dtype)) for c in SCHEMA if c.name in table}
    return pd.DataFrame(columns).reset_index(drop=True)


def is_malicious(labels: pd.Series) -> np.ndarray:
    """Bool array: True where the label is malicious, False where benign or missing."""
    return labels.eq(MALICIOUS).fillna(False).to_numpy(bool)


def is_address(text: str) -> bool:
    """Whether the text is an IPv4 or IPv6 address."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        # Ten times as slow, and knows the interface of an IPv6.
        try:
            ipaddress.ip_address(text)
        except ValueError:
            return False
    return len(text) <= MAX_ADDRESS_LENGTH
