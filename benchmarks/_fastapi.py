"""The route for verdicts as one writes it in FastAPI with Pydantic: the same detector, the same windows.

No checkpoints, no positions, no limits, no token. `FLOWSENTRY_BENCH_DETECTOR` is the folder of the detector.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, Field

from flowsentry.detector import Detector, Judged, Watch
from flowsentry.flows.columns import Columns, has_payload, transport_number
from flowsentry.flows.hashing import hash_bytes
from flowsentry.flows.schema import BENIGN, MALICIOUS


class Flow(BaseModel):
    """A report of a flow."""

    flow_id: Annotated[str, Field(min_length=1, max_length=256)]
    src_ip: str
    dst_ip: str
    src_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    dst_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    transport: str | None = None
    bytes: Annotated[int, Field(ge=0)]
    duration: Annotated[int, Field(ge=0)]
    time: datetime | int
    final: bool = False


class Flows(BaseModel):
    """A request."""

    flows: list[Flow]


class Reason(BaseModel):
    """Why a flow is malicious."""

    feature: str
    value: float
    unit: str
    share: float
    text: str


class Verdict(BaseModel):
    """Of one flow."""

    index: int
    flow_id: str
    label: str
    anomaly_score: float
    threshold: float
    anomaly_type: str | None
    baseline_window: str | None
    warm: bool
    first_alarm: datetime | None
    model_version: str
    view_version: str
    reasons: list[Reason]


class Verdicts(BaseModel):
    """An answer."""

    stream: str
    seen: int
    verdicts: list[Verdict]


app = FastAPI()
detector = Detector.load(Path(os.environ["FLOWSENTRY_BENCH_DETECTOR"]))
watches: dict[str, Watch] = {}
features = {feature.name: feature for feature in detector.manifest.features}


@app.post("/v1/verdicts")
async def verdicts(body: Flows, stream: str = "default") -> Verdicts:
    """Judge the next flows of a stream."""
    flows = body.flows
    if stream not in watches:
        watches[stream] = detector.watch()
    watch = watches[stream]
    judged = watch.take(_columns(flows))
    seen = watch.stream.seen
    return Verdicts(stream=stream, seen=seen, verdicts=[_verdict(judged, n, flow) for n, flow in enumerate(flows)])


def _columns(flows: list[Flow]) -> Columns:
    transport = np.array([transport_number(flow.transport) for flow in flows], np.int64)
    sizes = np.array([flow.bytes for flow in flows], np.int64)
    return Columns(
        time=np.array([_milliseconds(flow.time) for flow in flows], np.int64),
        flow_id=_hashes([flow.flow_id for flow in flows]),
        src_ip=_hashes([flow.src_ip for flow in flows]),
        dst_ip=_hashes([flow.dst_ip for flow in flows]),
        final=np.array([flow.final for flow in flows], bool),
        src_port=np.array([flow.src_port or 0 for flow in flows], np.int64),
        dst_port=np.array([flow.dst_port or 0 for flow in flows], np.int64),
        transport=transport,
        bytes=sizes,
        duration=np.array([flow.duration for flow in flows], np.int64),
        payload=has_payload(transport, sizes),
        table=pd.DataFrame,
    )


def _hashes(texts: list[str]) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return hash_bytes(offsets, np.frombuffer(b"".join(encoded), np.uint8))


def _milliseconds(time: datetime | int) -> int:
    return time if isinstance(time, int) else int(time.timestamp() * 1000)


def _verdict(judged: Judged, n: int, flow: Flow) -> Verdict:
    malicious = bool(judged.malicious[n])
    found: list[Any] = judged.reasons(np.array([n]))[0] if malicious else []
    leading = features[found[0]["feature"]] if found else None
    alarm = int(judged.first_alarm[n])
    return Verdict(
        index=n,
        flow_id=flow.flow_id,
        label=MALICIOUS if malicious else BENIGN,
        anomaly_score=float(judged.score[n]),
        threshold=detector.limit,
        anomaly_type=leading.anomaly if leading else None,
        baseline_window=leading.window if leading else None,
        warm=bool(judged.warm[n]),
        first_alarm=datetime.fromtimestamp(alarm / 1000, UTC) if alarm else None,
        model_version="1",
        view_version=detector.manifest.version,
        reasons=[Reason(**reason) for reason in found],
    )
