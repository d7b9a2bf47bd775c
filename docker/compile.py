"""Compile what every stream of flows needs, so that its machine code is in the image."""

import pandas as pd

from flowsentry.features import kernel
from flowsentry.flows.columns import Columns
from flowsentry.flows.reports import identify
from flowsentry.serving import _values

COUNT = 3
VALUES = {
    "flow_id": ["a", "b", "c"],
    "src_ip": ["192.0.2.1"] * COUNT,
    "dst_ip": ["192.0.2.2"] * COUNT,
    "src_port": [40_000] * COUNT,
    "dst_port": [80] * COUNT,
    "transport": ["tcp"] * COUNT,
    "bytes": [60] * COUNT,
    "duration": [0] * COUNT,
    "time": ["2020-09-13T12:26:40Z"] * COUNT,
    "final": [True] * COUNT,
}

fields = _values.fields(VALUES, COUNT, rejects := _values.Rejects())
_values.check(fields, rejects, latest_ms=2**50)
assert not rejects

texts = ("src_ip", "dst_ip", "transport")
reports = pd.DataFrame(VALUES).astype(dict.fromkeys(texts, "category"))
reports["time"] = pd.to_datetime(reports["time"])
reports["recording"] = "a"
identify(reports)
stream = kernel.Stream()
stream.advance(Columns.of(reports), lambda rows: rows.sum(axis=1, dtype=float), 1.0)
kernel._thinned(stream._entities, stream._entities.arrays["counters"][:, kernel.LAST], 1, 1 << 20)
