"""The service's interface, published: JSON Schema of a verdict and OpenAPI of everything.

The models here are documentation and the tests' measure; the service itself reads and writes without them (`wire`).
`python -m flowsentry.serving.schema docs/schema` writes the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from flowsentry.features.views import Anomaly, ViewManifest, Window
from flowsentry.flows.schema import MAX_ADDRESS_LENGTH, MAX_COUNT, MAX_DURATION_NS, MAX_PORT
from flowsentry.serving._values import MAX_FLOW_ID, REASONS
from flowsentry.serving.protocol import ARROW, JSON, NDJSON

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
VERDICT_ID: Final = "urn:flowsentry:verdict:1"
STREAM_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


PROBLEMS: Final = {
    "invalid": (400, "Bad request"),
    "unauthorized": (401, "Unauthorized"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "timeout": (408, "Request timeout"),
    "seen_mismatch": (409, "Another position"),
    "too_large": (413, "Too large"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "bad_flows": (422, "Bad flows"),
    "stream_busy": (423, "Stream busy"),
    "internal": (500, "Internal error"),
    "busy": (503, "Busy"),
}
"""HTTP status and title of every problem's code."""

Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Address = Annotated[str, Field(min_length=2, max_length=MAX_ADDRESS_LENGTH)]
Share = Annotated[float, Field(ge=0, le=1)]
Reject = Literal[REASONS]  # type: ignore[valid-type]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Flow(_Model):
    """A flow, or one report of it. Keys that are not listed are ignored."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    flow_id: Annotated[str, Field(min_length=1, max_length=MAX_FLOW_ID)]
    """The meter's id; comes again when ports are reused."""
    src_ip: Address
    """Source address, IPv4 or IPv6."""
    dst_ip: Address
    """Destination address, IPv4 or IPv6."""
    src_port: Port | None = None
    """Source port; only TCP and UDP must have both."""
    dst_port: Port | None = None
    """Destination port."""
    transport: str | None = None
    """tcp, udp, icmp, ipv6-icmp, sctp, gre, ...; upper or lower case."""
    bytes: Count
    """Bytes in both directions since the flow began."""
    duration: Annotated[int, Field(ge=0, le=MAX_DURATION_NS)]
    """Nanoseconds since the flow began."""
    time: AwareDatetime | Annotated[int, Field(ge=0)]
    """When the report was made: RFC 3339, or milliseconds since 1970; at most ten minutes ahead of the service."""
    final: bool = False
    """The meter says that this is the flow's last report."""
    packets: Count | None = None
    """Packets in both directions since the flow began, if the meter counts them."""


class Flows(_Model):
    """Body of a request for verdicts."""

    model_config = ConfigDict(extra="allow")

    flows: list[Flow]


class Reason(_Model):
    """One feature that made a verdict."""

    feature: str
    """Name in the view's manifest."""
    value: float | None
    """In the feature's unit; null for a feature that is an identity."""
    unit: str
    share: Share
    """Of all that speaks for malice; 0 if the model names nothing and the most unusual feature is told."""
    text: str
    """In words, with the value."""


class Verdict(_Model):
    """What the detector says of a flow."""

    index: Annotated[int, Field(ge=0)]
    """Place of the flow in the request, from 0."""
    flow_id: Annotated[str, Field(min_length=1, max_length=MAX_FLOW_ID)]
    label: Literal["benign", "malicious"]
    """Malicious if the score is at or above the threshold."""
    anomaly_score: Annotated[float, Field(ge=0)]
    """Surprise, -log10 of the share of benign flows that score as high: the flow's highest so far."""
    threshold: Annotated[float, Field(ge=0)]
    """In the unit of the score."""
    anomaly_type: Anomaly | None
    """What the first reason stands for; null for a benign flow."""
    baseline_window: Window | None
    """What the first reason's value is taken over or compared with; null for a benign flow."""
    warm: bool
    """The stream has been watched long enough to know what is normal in it."""
    first_alarm: AwareDatetime | None
    """The stream's clock when a report of this flow was first malicious; null for a benign flow."""
    model_version: str
    view_version: str
    """Of the feature view, which travels with the model."""
    reasons: Annotated[list[Reason], Field(max_length=3)]
    """Best first; empty for a benign flow."""


class Rejected(_Model):
    """A flow that was not judged."""

    index: Annotated[int, Field(ge=0)]
    """Place of the flow in the request, from 0."""
    reason: Reject


class RejectedLine(_Model):
    """A flow that was not judged, in an NDJSON answer."""

    index: Annotated[int, Field(ge=0)]
    rejected: Reject


class Position(_Model):
    """Where a stream is."""

    stream: Annotated[str, Field(pattern=STREAM_PATTERN)]
    seen: Annotated[int, Field(ge=0)]
    """Flows of the stream so far, rejected ones too."""
    durable: Annotated[int, Field(ge=0)]
    """How many of them a checkpoint has: a client keeps the others until they are."""


class Answer(Position):
    """JSON answer to a request for verdicts."""

    model_version: str
    view: Literal["paper", "behaviour"]
    view_version: str
    threshold: float
    verdicts: list[Verdict]
    """Of the good flows, in their order; empty if they were only absorbed."""
    rejected: list[Rejected]
    """The bad flows, in their order."""


class StreamStatus(Position):
    """State of a stream."""

    warm: bool


class Released(_Model):
    """Answer to a release."""

    streams: Annotated[int, Field(ge=0)]
    """How many were checkpointed and dropped."""


class Problem(_Model):
    """An error (RFC 9457). It never holds any part of the request."""

    title: str
    status: int
    code: Literal[tuple(PROBLEMS)]  # type: ignore[valid-type]
    detail: str
    seen: Annotated[int | None, Field(ge=0)] = None
    """With seen_mismatch: flows that the service has seen of the stream."""
    durable: Annotated[int | None, Field(ge=0)] = None
    """With seen_mismatch: how many of them a checkpoint has."""
    rejected: list[Rejected] | None = None
    """With bad_flows: every bad flow."""


class ModelDescription(_Model):
    """What answers."""

    model_version: str
    digest: str
    """SHA-256 of the bundle; empty outside one."""
    detector_digest: str
    """SHA-256 of all that decides a verdict."""
    view: Literal["paper", "behaviour"]
    view_version: str
    threshold: float
    target_fpr: float
    """Share of benign flows that may be flagged, which set the threshold."""
    needs_effect: bool
    """Only flows with a feature at its minimum effect are flagged."""
    manifest: ViewManifest
    """The view: features with type, unit and description, statistics, lineage."""
    card: dict[str, Any]
    """Model card: data, protocols, scores and baselines."""


_PUBLISHED: Final = (
    *(Flows, Answer, RejectedLine, StreamStatus, Released, ModelDescription, Problem),
)  # Flow, Verdict, Reason and Rejected come along


def verdict_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of one verdict."""
    return {"$schema": DIALECT, "$id": VERDICT_ID, **Verdict.model_json_schema(mode="serialization")}


def openapi() -> dict[str, Any]:
    """OpenAPI 3.1 document of the whole HTTP interface."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _PUBLISHED], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FlowSentry",
            "version": "1",
            "summary": "Network flows in, verdicts out.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "jsonSchemaDialect": DIALECT,
        "security": [{}, {"bearer": []}],
        "paths": _completed(
            {
                "/v1/verdicts": {"post": _verdicts()},
                "/v1/streams/{stream}": {
                    "parameters": [_parameter("stream", "path", _STREAM_NAME, "Name of the stream.")],
                    "get": _operation(
                        "Where a stream is", {"200": _content("State of the stream.", "StreamStatus")}, 404
                    ),
                    "delete": _operation(
                        "Forget a stream with its checkpoint",
                        {"204": {"description": "It is forgotten, or was not there."}},
                        *(404, 423),
                    ),
                },
                "/v1/release": {
                    "post": _operation(
                        "Checkpoint and drop all streams, before another service goes on with them",
                        {"200": _content("How many.", "Released")},
                    )
                },
                "/v1/model": {"get": _operation("What answers", {"200": _content("The model.", "ModelDescription")})},
                "/v1/openapi.json": {
                    "get": _operation(
                        "This document",
                        {"200": {"description": "OpenAPI 3.1.", "content": {JSON: {"schema": {"type": "object"}}}}},
                    )
                },
                "/metrics": {
                    "get": _operation(
                        "Metrics",
                        {
                            "200": {
                                "description": "In the text format of Prometheus.",
                                "content": {"text/plain": {"schema": {"type": "string"}}},
                            }
                        },
                        always=_OPEN,
                    )
                    | _NO_TOKEN
                },
                **{path: {"get": _health(summary)} for path, summary in HEALTH.items()},
            }
        ),
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Needed if the service has a token."}
            },
        },
    }


HEALTH: Final = {
    "/livez": "Whether the process is alive",
    "/readyz": "Whether the model and the kernel are loaded and warm",
    "/healthz": "Whether the process is alive",
}
_NO_TOKEN: Final[dict[str, Any]] = {"security": [{}]}
_OPEN: Final = (405, 408, 413, 500, 503)
"""Statuses of problems that every request may meet. At the stable address a proxy takes a request in and waits for a
service: so each may last too long, be too large, or find none."""
_ALWAYS: Final = (400, 401, *_OPEN)
_STREAM_NAME: Final = {"type": "string", "pattern": STREAM_PATTERN}
_FLAG: Final = {"type": "boolean", "default": False}


def _verdicts() -> dict[str, Any]:
    parameters = [
        _parameter("stream", "query", {**_STREAM_NAME, "default": "default"}, "Stream that the flows belong to."),
        _parameter(
            "seen",
            "query",
            {"type": "integer", "minimum": 0, "maximum": 10**15 - 1},
            "Flows that the service should have seen of the stream; without it, it goes on from what it has.",
        ),
        _parameter("absorb", "query", _FLAG, "Take the flows in without verdicts: the client has these already."),
        _parameter("anew", "query", _FLAG, "Begin the stream anew at the position `seen`, with nothing known."),
        _parameter(
            "on_bad",
            "query",
            {"type": "string", "enum": ["reject_rows", "reject_batch"], "default": "reject_rows"},
            "Reject bad flows alone, or take nothing if there is one.",
        ),
    ]
    lines = "One flow a line."
    table = "An Arrow IPC stream with the columns of a flow, not compressed; `time` may be a timestamp."
    answer = _content("A verdict or a reject for every flow.", "Answer")
    answer["content"] |= {
        NDJSON: {"schema": {"type": "string", "description": "A Verdict or a RejectedLine for every flow, in order."}},
        ARROW: {"schema": {"type": "string", "format": "binary", "description": "The same columns, one row per flow."}},
    }
    answer["headers"] = {
        "FlowSentry-Stream": {"schema": _STREAM_NAME},
        **{f"FlowSentry-{name}": {"schema": {"type": "integer", "minimum": 0}} for name in ("Seen", "Durable")},
    }
    return {
        **_operation("Judge flows", {"200": answer}, 409, 415, 422, 423),
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": _reference("Flows")},
                NDJSON: {"schema": {"type": "string", "description": lines}},
                ARROW: {"schema": {"type": "string", "format": "binary", "description": table}},
            },
        },
    }


def _parameter(name: str, place: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    required = {"required": True} if place == "path" else {}
    return {"name": name, "in": place, **required, "schema": schema, "description": description}


def _reference(model: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model}"}


def _content(description: str, model: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": _reference(model)}}}


def _completed(paths: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With HEAD wherever there is GET, and OPTIONS wherever the answer is ours."""
    for path, item in paths.items():
        if "get" in item:
            responses = {
                status: {name: value for name, value in response.items() if name != "content"}
                for status, response in item["get"]["responses"].items()
            }
            item["head"] = item["get"] | {"responses": responses}
        if path not in HEALTH:
            allow = {"Allow": {"schema": {"type": "string"}}}
            answers = {"204": {"description": "They are in the header.", "headers": allow}}
            is_open = path == "/metrics"
            always = tuple(status for status in (_OPEN if is_open else _ALWAYS) if status not in (400, 405))
            item["options"] = _operation("Methods of this path", answers, always=always) | (
                _NO_TOKEN if is_open else {}
            )
    return paths


def _operation(
    summary: str, answers: dict[str, Any], *statuses: int, always: tuple[int, ...] = _ALWAYS
) -> dict[str, Any]:
    """An operation with the problems of these statuses, and those that all have."""
    problems: dict[int, list[str]] = {}
    for code, (status, _) in PROBLEMS.items():
        if status in (*always, *statuses):
            problems.setdefault(status, []).append(code)
    described = {
        str(status): {
            "description": f"{PROBLEMS[codes[0]][1]}: {', '.join(codes)}.",
            "content": {"application/problem+json": {"schema": _reference("Problem")}},
        }
        for status, codes in problems.items()
    }
    return {"summary": summary, "responses": answers | described}


def _health(summary: str) -> dict[str, Any]:
    problems = {
        str(status): {"description": title} for status, title in PROBLEMS.values() if status in (405, 408, 413, 500)
    }
    responses = {"200": {"description": "Yes."}, **problems, "503": {"description": "No."}}
    return {"summary": summary, "responses": responses} | _NO_TOKEN


FILES: Final = {"verdict.schema.json": verdict_schema, "openapi.json": openapi}


def write(folder: Path) -> None:
    """Write the published files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in FILES.items():
        (folder / name).write_text(json.dumps(document(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
