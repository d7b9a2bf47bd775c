"""From the bytes of a request to arrays, and from verdicts to the bytes of an answer: JSON, NDJSON and Arrow.

Nothing goes through pandas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa

from flowsentry.errors import ServiceError
from flowsentry.flows.columns import Columns, has_payload
from flowsentry.flows.schema import BENIGN, MALICIOUS, conform
from flowsentry.reasons import AT_HAND
from flowsentry.serving import _arrow
from flowsentry.serving._values import COLUMNS, MISSING, Fields, Rejects, check, fields
from flowsentry.serving.protocol import ARROW, JSON, NDJSON

if TYPE_CHECKING:
    from flowsentry.detector import Judged

MEDIA_TYPES: Final = (JSON, NDJSON, ARROW)

AHEAD_MS: Final = 600_000
"""How far a report's time may be ahead of the service's clock: a stream's clock never runs backwards."""


class Malformed(ServiceError):
    """A body that is not a request; `code` is that of the problem, `detail` is in fixed words."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Batch:
    """The flows of one request."""

    columns: Columns
    """The good flows, in their order."""
    index: np.ndarray
    """int64 [good]: place in the request, from 0."""
    flow_ids: list[str]
    """[good]."""
    rejected: list[tuple[int, str]]
    """Place in the request and reason of every bad flow, in order of place."""
    count: int
    """Flows in the request, good and bad."""


@dataclass(frozen=True)
class Head:
    """What an answer says besides its verdicts."""

    stream: str
    seen: int
    durable: int
    model_version: str
    view: str
    view_version: str
    threshold: float


def parse(body: bytes | memoryview, media_type: str, *, max_flows: int, now_ms: int) -> Batch:
    """Read the flows of a request.

    Args:
        body: as it came, not compressed.
        media_type: one of `MEDIA_TYPES`, without parameters.
        max_flows: most flows in a request.
        now_ms: the service's clock, ms since 1970.

    Raises:
        Malformed: the body as a whole cannot be read; codes invalid, too_large and unsupported_media_type.
    """
    if media_type == JSON:
        return _of_objects(_json_flows(body, max_flows), now_ms)
    if media_type == NDJSON:
        return _of_objects(_ndjson_flows(body, max_flows), now_ms)
    if media_type == ARROW:
        return _of_arrow(body, max_flows, now_ms)
    raise Malformed("unsupported_media_type", f"the body must be one of {', '.join(MEDIA_TYPES)}")


def _too_many(max_flows: int) -> Malformed:
    return Malformed("too_large", f"there are more than {max_flows} flows in the request")


_MOST_OF_A_FLOW: Final = {"{": (2, "objects"), "[": (2, "lists"), ",": (24, "values")}
"""What of JSON costs memory, and how many of each are allowed for every flow of the largest request."""
_MOST_BESIDES: Final = 1000


def _limit_values(body: bytes | memoryview, max_flows: int) -> None:
    """Refuse a body whose values would take many times its length, before any of them is made."""
    if len(body) <= 2 * max_flows + _MOST_BESIDES:
        return
    signs = np.frombuffer(body, np.uint8)
    for sign, (share, things) in _MOST_OF_A_FLOW.items():
        most = share * max_flows + _MOST_BESIDES
        if np.count_nonzero(signs == ord(sign)) > most:
            raise Malformed("too_large", f"there are more than {most} {things} in the request")


def _json_flows(body: bytes | memoryview, max_flows: int) -> list[Any]:
    _limit_values(body, max_flows)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("invalid", "the body is not valid JSON in UTF-8") from None
    flows = content.get("flows") if isinstance(content, dict) else None
    if not isinstance(flows, list):
        raise Malformed("invalid", 'the body is not an object with a list "flows"')
    if len(flows) > max_flows:
        raise _too_many(max_flows)
    return flows


def _ndjson_flows(body: bytes | memoryview, max_flows: int) -> list[Any]:
    """One value for every line that is not blank, None for one that is no JSON."""
    _limit_values(body, max_flows)
    content = bytes(body)
    # As many blank lines are let pass, because splitting costs memory for each.
    if content.count(b"\n") > 2 * max_flows:
        raise _too_many(max_flows)
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        flows = list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        flows = [_loaded(line) for line in lines if not line.isspace() and line]
    if not flows:
        raise Malformed("invalid", "the body is empty")
    if len(flows) > max_flows:
        raise _too_many(max_flows)
    return flows


def _loaded(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


def _of_objects(flows: list[Any], now_ms: int) -> Batch:
    rejects = Rejects()
    if set(map(type, flows)) - {dict}:
        for place, flow in enumerate(flows):
            if type(flow) is not dict:
                rejects.not_an_object(place)
                flows[place] = {}
    return _batch(fields(_columns(flows), len(flows), rejects), rejects, now_ms)


_ALL: Final = itemgetter(*COLUMNS)
_WITHOUT_PACKETS: Final = itemgetter(*COLUMNS[:-1])


def _columns(flows: list[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """The values of every column; one that no flow has may be left out."""
    for names, get in ((COLUMNS, _ALL), (COLUMNS[:-1], _WITHOUT_PACKETS)):
        if not flows or names[-1] not in flows[0]:
            continue
        try:
            return dict(zip(names, zip(*map(get, flows), strict=True), strict=True))
        except KeyError:
            pass
    return {name: [flow.get(name) for flow in flows] for name in COLUMNS}


def _batch(fields: Fields, rejects: Rejects, now_ms: int) -> Batch:
    check(fields, rejects, latest_ms=now_ms + AHEAD_MS)
    count = len(fields.flow_ids)
    rejected = rejects.listed() if rejects else []
    keep, ids = np.arange(count), fields.flow_ids
    if rejected:
        keep = np.delete(keep, [place for place, _ in rejected])
        ids = [ids[place] for place in keep.tolist()]
    return Batch(_good(fields, keep), keep, ids, rejected, count)


def _good(fields: Fields, keep: np.ndarray) -> Columns:
    every = len(keep) == len(fields.flow_ids)

    def kept(values: np.ndarray) -> np.ndarray:
        return values if every else np.asarray(values[keep])

    packets = None if fields.packets is None else kept(fields.packets)
    transport, sizes, time = kept(fields.transport), kept(fields.bytes), kept(fields.time)
    return Columns(
        time=time // 1000,
        flow_id=kept(fields.flow_hashes),
        src_ip=kept(fields.src_ip),
        dst_ip=kept(fields.dst_ip),
        final=kept(fields.final),
        src_port=_or_zero(kept(fields.src_port)),
        dst_port=_or_zero(kept(fields.dst_port)),
        transport=transport,
        bytes=sizes,
        duration=kept(fields.duration),
        payload=has_payload(transport, sizes, packets, kept(fields.ipv6)),
        table=lambda: _table(fields, keep),
    )


def _or_zero(ports: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(ports, 0))


def _table(fields: Fields, keep: np.ndarray) -> pd.DataFrame:
    """The canonical table of the good flows."""
    texts = {name: [values[i] for i in keep.tolist()] for name, values in fields.texts().items()}

    def gaps(numbers: np.ndarray) -> pd.Series:
        return pd.Series(numbers[keep], dtype="Int64").mask(numbers[keep] == MISSING)

    columns: dict[str, Any] = {
        "recording": "stream",
        "file": "request",
        "row": keep + 1,
        "flow_id": [fields.flow_ids[i] for i in keep.tolist()],
        "final": fields.final[keep],
        "src_ip": texts["src_ip"],
        "dst_ip": texts["dst_ip"],
        "src_port": gaps(fields.src_port),
        "dst_port": gaps(fields.dst_port),
        "transport": pd.Series([text.lower() if text else None for text in texts["transport"]], dtype=object),
        "bytes": fields.bytes[keep],
        "time": pd.to_datetime(fields.time[keep], unit="us", utc=True),
        "duration": fields.duration[keep],
        "label": pd.Series([None] * len(keep), dtype=object),
    }
    if fields.packets is not None and (fields.packets[keep] != MISSING).any():
        columns["packets"] = gaps(fields.packets)
    return conform(pd.DataFrame(columns))


def _of_arrow(body: bytes | memoryview, max_flows: int, now_ms: int) -> Batch:
    try:
        table = _arrow.read(body, max_flows)
    except _arrow.NotArrow as error:
        raise Malformed("invalid", str(error)) from None
    except _arrow.TooManyRows:
        raise _too_many(max_flows) from None
    rejects = Rejects()
    return _batch(_arrow.fields(table, rejects), rejects, now_ms)


def answer(media_type: str, head: Head, judged: Judged | None, batch: Batch) -> bytes:
    """The body of an answer.

    Args:
        media_type: one of `MEDIA_TYPES`.
        head: of the stream after this request.
        judged: the good flows' verdicts; None for flows that were only absorbed: only rejects are listed then.
        batch: the request.
    """
    if media_type == ARROW:
        return _arrow_answer(head, judged, batch)
    verdicts: Iterator[dict[str, Any]] = iter(()) if judged is None else _verdicts(head, judged, batch)
    if media_type == NDJSON:
        lines = verdicts
        if batch.rejected:
            rejects = ({"index": place, "rejected": reason} for place, reason in batch.rejected)
            lines = merge(verdicts, rejects, key=itemgetter("index"))
        return b"".join([orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines])
    parts = []
    while some := list(islice(verdicts, AT_HAND)):
        parts.append(orjson.dumps(some)[1:-1])
    return orjson.dumps(
        {
            "stream": head.stream,
            "seen": head.seen,
            "durable": head.durable,
            "model_version": head.model_version,
            "view": head.view,
            "view_version": head.view_version,
            "threshold": head.threshold,
            "verdicts": orjson.Fragment(b"[%b]" % b",".join(parts)),
            "rejected": [{"index": place, "reason": reason} for place, reason in batch.rejected],
        }
    )


def _verdicts(head: Head, judged: Judged, batch: Batch) -> Iterator[dict[str, Any]]:
    threshold, model_version, view_version = head.threshold, head.model_version, head.view_version
    none: list[Any] = []
    alarms = _alarms(judged)
    malicious = judged.malicious.tolist()
    columns = (batch.index.tolist(), batch.flow_ids, judged.score.tolist(), judged.warm.tolist(), malicious)
    for place, flow_id, score, warm, is_malicious in zip(*columns, strict=True):
        kind, window, time, reasons = next(alarms) if is_malicious else (None, None, None, none)
        yield {
            "index": place,
            "flow_id": flow_id,
            "label": MALICIOUS if is_malicious else BENIGN,
            "anomaly_score": score,
            "threshold": threshold,
            "anomaly_type": kind,
            "baseline_window": window,
            "warm": warm,
            "first_alarm": time,
            "model_version": model_version,
            "view_version": view_version,
            "reasons": reasons,
        }


def _alarms(judged: Judged) -> Iterator[tuple[str | None, str | None, str | None, list[Any]]]:
    """What only malicious flows have: kind, window, time of the first alarm, and reasons."""
    places = np.flatnonzero(judged.malicious)
    if not len(places):
        return iter(())
    told = judged.told(places)
    of_feature = [(feature.anomaly, feature.window) for feature in told.features]
    kinds, windows = zip(*[of_feature[j] for j in told.leading().tolist()], strict=True)
    return zip(kinds, windows, _rfc3339(judged.first_alarm[places]), told.reasons(), strict=True)


def _rfc3339(milliseconds: np.ndarray) -> list[str | None]:
    """Texts of the times, None for 0; many flows of a flood have the same."""
    distinct, places = np.unique(milliseconds, return_inverse=True)
    stamps = np.datetime_as_string(distinct.astype("datetime64[ms]"), unit="ms").tolist()
    texts = [f"{stamp}Z" if moment else None for moment, stamp in zip(distinct.tolist(), stamps, strict=True)]
    return [texts[place] for place in places.tolist()]


_REASON: Final = pa.struct(
    [
        ("feature", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("share", pa.float64()),
        ("text", pa.string()),
    ]
)
ANSWER: Final = pa.schema(
    [
        ("index", pa.int64()),
        ("flow_id", pa.string()),
        ("label", pa.string()),
        ("anomaly_score", pa.float64()),
        ("threshold", pa.float64()),
        ("anomaly_type", pa.string()),
        ("baseline_window", pa.string()),
        ("warm", pa.bool_()),
        ("first_alarm", pa.timestamp("ms", "UTC")),
        ("model_version", pa.string()),
        ("view_version", pa.string()),
        ("reasons", pa.list_(_REASON)),
        ("rejected", pa.string()),
    ]
)
"""Columns of an Arrow answer: one row per flow, in their order; of a rejected one only `index` and `rejected`."""
_LABELS: Final = pa.array([BENIGN, MALICIOUS])


def _arrow_answer(head: Head, judged: Judged | None, batch: Batch) -> bytes:
    if judged is None:
        index, columns = np.empty(0, np.int64), [pa.nulls(0, field.type) for field in list(ANSWER)[1:-1]]
    else:
        index, columns = batch.index, _verdict_columns(head, judged, batch)
    reasons = pa.nulls(len(index), pa.string())
    if batch.rejected:
        bad = np.array([place for place, _ in batch.rejected], np.int64)
        order = np.argsort(np.concatenate([index, bad]))
        good = pa.array(order, mask=order >= len(index))
        columns = [column.take(good) for column in columns]
        words = pa.array([reason for _, reason in batch.rejected], pa.string())
        reasons = words.take(pa.array(order - len(index), mask=order < len(index)))
        index = np.concatenate([index, bad])[order]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ANSWER) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays([pa.array(index), *columns, reasons], schema=ANSWER))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _verdict_columns(head: Head, judged: Judged, batch: Batch) -> list[pa.Array]:
    """Columns of `ANSWER` from `flow_id` to `reasons`, one row per good flow."""
    count, places = len(batch.index), np.flatnonzero(judged.malicious)
    told = judged.told(places)
    features, ends = told.features, np.zeros(count + 1, np.int32)
    ends[places + 1] = np.diff(told.ends)
    leading = np.full(count, -1)
    leading[places] = told.leading()
    taken = pa.array(leading, mask=leading < 0)
    parts = [
        pa.array([feature.name for feature in features], pa.string()).take(pa.array(told.feature)),
        pa.array(told.value, mask=told.hidden),
        pa.array([feature.unit for feature in features], pa.string()).take(pa.array(told.feature)),
        pa.array(told.share),
        pa.array(told.text, pa.string()),
    ]
    reasons = pa.ListArray.from_arrays(
        pa.array(np.cumsum(ends, dtype=np.int32)), pa.StructArray.from_arrays(parts, fields=list(_REASON))
    )
    alarm = pa.array(judged.first_alarm, mask=judged.first_alarm == 0)
    return [
        pa.array(batch.flow_ids, pa.string()),
        _LABELS.take(pa.array(judged.malicious.astype(np.int8))),
        pa.array(judged.score),
        pa.repeat(pa.scalar(head.threshold, pa.float64()), count),
        pa.array([feature.anomaly for feature in features], pa.string()).take(taken),
        pa.array([feature.window for feature in features], pa.string()).take(taken),
        pa.array(judged.warm),
        alarm.cast(pa.timestamp("ms", "UTC")),
        pa.repeat(head.model_version, count),
        pa.repeat(head.view_version, count),
        reasons,
    ]
