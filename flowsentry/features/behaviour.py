"""The `behaviour` view: what a client, a service and the edge between them do, never who they are.

Units: flows and failures are counts, a burst is a ratio to the entity's own past peak of 60 s (at least 1), a failure
is a TCP flow that carried no payload. Statistics of a service or a client are multiplied by the flow's own evidence
(it failed, or its edge is new), so that the innocent flows of a victim do not look guilty. Minimum effects:
docs/decisions/0009.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from flowsentry.features import kernel
from flowsentry.features.views import Feature
from flowsentry.flows.columns import Columns

NAME: Final = "behaviour"
VERSION: Final = kernel.KERNEL_VERSION
WARM_UP_SECONDS: Final = kernel.WARM_UP_TICKS * 10

_MINIMUM_EFFECTS: Final = {
    **{kernel.FEATURES[feature]: limit for feature, limit in kernel.MARKS},
    "service_fail_burst": 34.0,
    "client_fail_burst": 100.0,
    "service_burst": 100.0,
    "edge_persistence": 15.0,
    "client_new_edges": 100.0,
}


_STANDS_FOR: Final = {
    "no_payload": ("failed connections", "flow"),
    "edge_new": ("new contact", "history"),
    "service_new": ("new contact", "history"),
    "edge_fails_10s": ("failed connections", "10s"),
    "edge_fails_60s": ("failed connections", "60s"),
    "edge_fails_300s": ("failed connections", "300s"),
    "service_fails_60s": ("failed connections", "60s"),
    "client_fails_60s": ("failed connections", "60s"),
    "edge_fail_burst": ("burst", "history"),
    "service_fail_burst": ("burst", "history"),
    "client_fail_burst": ("burst", "history"),
    "edge_burst": ("burst", "history"),
    "service_burst": ("burst", "history"),
    "client_burst": ("burst", "history"),
    "edge_fail_share": ("failed connections", "300s"),
    "service_fail_share": ("failed connections", "300s"),
    "client_failed_edges": ("fan-out", "300s"),
    "client_new_edges": ("fan-out", "300s"),
    "service_dead": ("dead service", "history"),
    "edge_dead": ("dead service", "history"),
    "edge_bytes_burst": ("volume", "history"),
    "edge_persistence": ("persistence", "300s"),
}
"""The anomaly that a high value stands for, and what it is taken over or compared with."""


def _feature(name: str, unit: str, description: str, kind: str = "number") -> Feature:
    anomaly, window = _STANDS_FOR[name]
    return Feature.model_validate(
        {
            "name": name,
            "unit": unit,
            "description": description,
            "kind": kind,
            "harm": 1,
            "minimum_effect": _MINIMUM_EFFECTS.get(name),
            "anomaly": anomaly,
            "window": window,
        }
    )


FEATURES: Final = (
    _feature("no_payload", "", "the flow is TCP and carried no payload", "flag"),
    _feature("edge_new", "", "the edge is not part of the baseline", "flag"),
    _feature("service_new", "", "the service is not part of the baseline", "flag"),
    _feature("edge_fails_10s", "flows", "failures on the edge in this tick"),
    _feature("edge_fails_60s", "flows", "failures on the edge in 60 s"),
    _feature("edge_fails_300s", "flows", "failures on the edge in 300 s"),
    _feature("service_fails_60s", "flows", "failures at the service in 60 s, if this flow failed"),
    _feature("client_fails_60s", "flows", "failures of the client in 60 s, if this flow failed"),
    _feature("edge_fail_burst", "ratio", "failures on the edge in 60 s to its own past peak"),
    _feature("service_fail_burst", "ratio", "failures at the service in 60 s to its past peak, if this flow failed"),
    _feature("client_fail_burst", "ratio", "failures of the client in 60 s to its past peak, if this flow failed"),
    _feature("edge_burst", "ratio", "flows on the edge in 60 s to its own past peak"),
    _feature("service_burst", "ratio", "flows to the service in 60 s to its past peak, if failed or on a new edge"),
    _feature("client_burst", "ratio", "flows of the client in 60 s to its past peak, if failed or on a new edge"),
    _feature("edge_fail_share", "share", "share of the edge's flows in 300 s that failed"),
    _feature(
        "service_fail_share",
        "share",
        "share of the service's flows in 300 s that failed, if this flow failed",
    ),
    _feature(
        "client_failed_edges",
        "edges",
        "the client's new edges of 300 s that only ever failed, if this is one",
    ),
    _feature("client_new_edges", "edges", "the client's new edges of 300 s, if this is one"),
    _feature("service_dead", "flows", "failures at a service that is new and never answered"),
    _feature("edge_dead", "flows", "failures on an edge that is new and was never answered"),
    _feature(
        "edge_bytes_burst",
        "ratio",
        "bytes of the edge in 60 s to its past peak, or to 1 MB where that was less",
    ),
    _feature("edge_persistence", "ticks", "ticks of 10 s of the last 30 in which a new edge had flows"),
)


def compute(reports: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The view's values for every report.

    Args:
        reports: canonical reports; each recording is a stream of its own, in arrival order.

    Returns:
        float32 table [reports, features] with the index of `reports`, and bool [reports]: the reported source is the
        service.
    """
    values = np.empty((len(reports), len(kernel.FEATURES)), np.float32)
    is_reversed = np.empty(len(reports), bool)
    for _, positions in reports.groupby("recording", observed=True, sort=False).indices.items():
        advanced = kernel.Stream().advance(Columns.of(reports.iloc[positions]))
        values[positions], is_reversed[positions] = advanced.features, advanced.is_reversed
    return pd.DataFrame(values, columns=list(kernel.FEATURES), index=reports.index), is_reversed
