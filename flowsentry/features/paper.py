"""The `paper` view: the ten columns of the original study, identities included, on a flow's last report.

It exists to reproduce the study and to show what its score is made of; nothing in it survives a change of cluster.
Columns are encoded as the study's public code does (TheScorpoi/k8s-attack-detection-system, pre-processing for the
feature store): addresses as numbers, IPv6 by a hash so large that it dwarfs every IPv4 address once they are scaled.
"""

from __future__ import annotations

import hashlib
import ipaddress
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.features.views import Feature

NAME: Final = "paper"
VERSION: Final = "1"
WARM_UP_SECONDS: Final = 0

_feature = partial(Feature, anomaly="learned pattern", window="training")

FEATURES: Final = (
    _feature(
        name="flow_id", identity=True, unit="rank", description="the meter's flow id, ranked as text", kind="category"
    ),
    _feature(name="final", unit="", description="the report is the flow's last by the meter", kind="flag"),
    _feature(
        name="src_ip",
        identity=True,
        unit="",
        description="source address: the number of an IPv4, 64 bits of hash of an IPv6",
    ),
    _feature(name="dst_ip", identity=True, unit="", description="destination address, likewise"),
    _feature(name="bytes", unit="bytes", description="bytes in both directions"),
    _feature(name="transport", unit="rank", description="transport protocol, ranked as text", kind="category"),
    _feature(name="time", identity=True, unit="s", description="time of the last report, since 1970"),
    _feature(name="duration", unit="ns", description="duration of the flow"),
    _feature(name="dst_port", identity=True, unit="", description="destination port, 0 where missing"),
    _feature(name="src_port", identity=True, unit="", description="source port, 0 where missing"),
)


def compute(flows: pd.DataFrame) -> pd.DataFrame:
    """The view's columns for every flow; categories stay text, the transform ranks them.

    Args:
        flows: flow table (the last report of every flow).

    Returns:
        Table [flows, features] with the index of `flows`.
    """
    return pd.DataFrame(
        {
            "flow_id": flows["flow_id"],
            "final": flows["final"].astype("float64"),
            "src_ip": _address_numbers(flows["src_ip"]),
            "dst_ip": _address_numbers(flows["dst_ip"]),
            "bytes": flows["bytes"].astype("float64"),
            "transport": flows["transport"],
            "time": flows["time"].astype("int64") / 1e6,
            "duration": flows["duration"].astype("float64"),
            "dst_port": flows["dst_port"].fillna(0).astype("float64"),
            "src_port": flows["src_port"].fillna(0).astype("float64"),
        }
    )


def _address_numbers(addresses: pd.Series) -> np.ndarray:
    numbers = [_number(str(address)) for address in addresses.cat.categories]
    return np.array([*numbers, 0.0])[addresses.cat.codes.to_numpy()]


def _number(address: str) -> float:
    if ":" in address:
        return float(int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big"))
    return float(int(ipaddress.IPv4Address(address)))
