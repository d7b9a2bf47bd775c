from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pytest
import uvicorn

from flowsentry.detector import Detector
from flowsentry.errors import StoreError
from flowsentry.serving import schema
from flowsentry.serving.app import LONG_BYTES, App, Model, Receive, Scope, Send, rehearse
from flowsentry.serving.settings import Settings
from flowsentry.serving.store import FolderStore, Store
from flowsentry.serving.streams import Limits, Streams
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

JSON, NDJSON, ARROW = "application/json", "application/x-ndjson", "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
MARK = "zqjxk"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Live:
    port: int
    app: App

    def ask(self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent = {"content-type": JSON} | sent
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def send(self, query: str, *flows: dict[str, Any], **headers: str) -> Answer:
        return self.ask("POST", f"/v1/verdicts?{query}", json.dumps({"flows": flows}).encode(), **headers)


def flow(number: int = 0, **changed: Any) -> dict[str, Any]:
    ordinary = {
        "flow_id": f"flow {number}", "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2", "src_port": 40_000 + number,
        "dst_port": 80, "transport": "tcp", "bytes": 5000, "duration": 1000, "time": 1_645_791_552_000, "final": True,
    }  # fmt: skip
    return ordinary | changed


@contextmanager
def live(detector: Detector, store: Store, **settings: Any) -> Iterator[Live]:
    """The application behind a real server."""
    streams = Streams(detector, store, Limits())
    app = App(Model(detector, "7", "d" * 64), streams, Settings(state="unused", **settings), b'{"openapi": "3.1.0"}')

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(serve, log_config=None, lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Live(listener.getsockname()[1], app)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        app.close()
        streams.close()


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small)


@pytest.fixture(scope="module")
def service(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(detector, FolderStore(tmp_path_factory.mktemp("state"))) as service:
        yield service


@pytest.fixture(scope="module")
def narrow(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With small limits and a token."""
    store = FolderStore(tmp_path_factory.mktemp("state"))
    with live(detector, store, body_bytes=2000, body_seconds=0.3, flows=3, token="s3cret") as service:
        yield service


def test_flows_are_answered_with_verdicts_in_their_order(service: Live) -> None:
    answer = service.send("stream=order", flow(0), flow(1, bytes=-1), flow(2))
    assert answer.status == 200
    assert answer.headers["content-type"] == JSON
    assert answer.headers["flowsentry-stream"] == "order"
    assert answer.headers["flowsentry-seen"] == "3"
    content = answer.json
    assert (content["stream"], content["seen"], content["model_version"]) == ("order", 3, "7")
    assert [(v["index"], v["flow_id"]) for v in content["verdicts"]] == [(0, "flow 0"), (2, "flow 2")]
    assert [r["index"] for r in content["rejected"]] == [1]


def test_without_a_name_the_stream_is_default_and_goes_on(service: Live) -> None:
    before = service.send("").json["seen"]
    assert service.send("", flow(1)).json["seen"] == before + 1
    assert service.ask("GET", "/v1/streams/default").json["seen"] == before + 1


def test_the_answer_has_the_type_of_the_body_or_of_accept(service: Live) -> None:
    line = json.dumps(flow()).encode()
    table = pa.Table.from_pylist([flow()])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    for body, sent, accept, expected in [
        (line, NDJSON, "*/*", NDJSON),
        (arrow, ARROW, "", ARROW),
        (line, NDJSON, f"text/html, {JSON};q=0.9", JSON),
        (line, f"{NDJSON}; charset=utf-8", ARROW, ARROW),
        (arrow, ARROW, "image/png", ARROW),
    ]:
        answer = service.ask("POST", "/v1/verdicts?stream=types", body, content_type=sent, accept=accept)
        assert (answer.status, answer.headers["content-type"]) == (200, expected), (sent, accept)
    rows = pa.ipc.open_stream(answer.body).read_all()
    assert rows.column_names[:3] == ["index", "flow_id", "label"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("POST", "/v1/verdicts?stream=-x", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?stream=%C3%A9", {}, b"{}", 400, "invalid"),
        ("POST", f"/v1/verdicts?stream={'a' * 65}", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?seen=-1", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?seen=1e3", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?seen=", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?absorb=1", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?anew=yes", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?on_bad=ignore", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?seen=1&seen=1", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?colour=red", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts?&", {}, b"{}", 400, "invalid"),
        ("POST", "/v1/verdicts", {}, b"", 400, "invalid"),
        ("POST", "/v1/verdicts", {}, b"[]", 400, "invalid"),
        ("POST", "/v1/verdicts", {"content_type": "text/csv"}, b"a,b", 415, "unsupported_media_type"),
        ("POST", "/v1/verdicts", {"content_encoding": "gzip"}, b"{}", 415, "unsupported_media_type"),
        ("GET", "/v1/verdicts", {}, None, 405, "method_not_allowed"),
        ("PROPFIND", "/v1/verdicts", {}, None, 405, "method_not_allowed"),
        ("POST", "/v1/model", {}, b"{}", 405, "method_not_allowed"),
        ("GET", "/v1/model?full=1", {}, None, 400, "invalid"),
        ("GET", "/v1/release", {}, None, 405, "method_not_allowed"),
        ("GET", "/v1/streams/unknown", {}, None, 404, "not_found"),
        ("GET", "/v1/streams/..%2F..%2Fetc", {}, None, 404, "not_found"),
        ("GET", "/v1/streams/", {}, None, 404, "not_found"),
        ("GET", "/v1/verdicts/", {}, None, 404, "not_found"),
        ("GET", "/", {}, None, 404, "not_found"),
    ],
)
def test_what_is_no_request_is_a_problem(
    service: Live, method: str, path: str, headers: dict[str, str], body: bytes | None, status: int, code: str
) -> None:
    answer = service.ask(method, path, body, **headers)
    assert (answer.status, answer.headers["content-type"]) == (status, PROBLEM)
    assert set(answer.json) == {"title", "status", "code", "detail"}
    assert (answer.json["status"], answer.json["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        (f"/v1/{MARK}", b"{}", {}),
        (f"/v1/streams/{MARK}!", b"{}", {}),
        (f"/v1/verdicts?{MARK}={MARK}", b"{}", {}),
        (f"/v1/verdicts?seen={MARK}", b"{}", {}),
        ("/v1/verdicts", MARK.encode(), {}),
        ("/v1/verdicts", b'{"zqjxk": 1}', {}),
        ("/v1/verdicts?on_bad=reject_batch", json.dumps({"flows": [flow(src_ip=MARK), flow(time=MARK)]}).encode(), {}),
        ("/v1/verdicts", json.dumps({"flows": [flow(src_ip=MARK)]}).encode(), {}),
        ("/v1/verdicts", b"{}", {"content_type": MARK}),
        ("/v1/verdicts", b"{}", {"content_encoding": MARK, "accept": MARK, "origin": f"https://{MARK}"}),
    ],
)
def test_no_answer_repeats_what_was_sent(service: Live, path: str, body: bytes, headers: dict[str, str]) -> None:
    answer = service.ask("POST", path, body, **headers)
    assert MARK not in str(answer.headers) + answer.body.decode()
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_one_bad_flow_refuses_the_batch_if_asked_and_nothing_is_taken(service: Live) -> None:
    service.send("stream=whole", flow(0))
    answer = service.send(
        "stream=whole&seen=1&on_bad=reject_batch", flow(1), flow(2, src_ip="nowhere"), flow(3, time=None)
    )
    assert (answer.status, answer.json["code"]) == (422, "bad_flows")
    assert [r["index"] for r in answer.json["rejected"]] == [1, 2]
    assert service.ask("GET", "/v1/streams/whole").json["seen"] == 1


def test_another_position_is_a_conflict_that_says_where_the_service_is(service: Live) -> None:
    service.send("stream=place&seen=0", flow(0), flow(1))
    answer = service.send("stream=place&seen=5", flow(2))
    assert (answer.status, answer.json["code"], answer.json["seen"]) == (409, "seen_mismatch", 2)
    assert 0 <= answer.json["durable"] <= 2
    assert service.send("stream=place&seen=2", flow(2)).status == 200


def test_a_repeated_request_gets_its_first_answer_and_counts_nothing(service: Live) -> None:
    first = service.send("stream=again&seen=0", flow(0), flow(1))
    flows = service.app.metrics.flows
    second = service.send("stream=again&seen=0", flow(0), flow(1))
    assert (second.status, second.body, second.headers["flowsentry-seen"]) == (200, first.body, "2")
    assert service.app.metrics.flows == flows
    assert service.send("stream=again&seen=0", flow(0), flow(9)).status == 409
    assert service.send("stream=again&seen=0", flow(0), flow(1), accept=ARROW).status == 409


def test_absorbed_flows_move_the_stream_but_get_no_verdicts(service: Live) -> None:
    flows = service.app.metrics.flows
    answer = service.send("stream=absorbed&seen=0&absorb=true", flow(0), flow(1))
    assert (answer.status, answer.json["seen"], answer.json["verdicts"]) == (200, 2, [])
    assert service.app.metrics.flows == flows


def test_a_stream_begins_anew_at_the_named_position(service: Live) -> None:
    service.send("stream=anew&seen=0", flow(0))
    assert service.send("stream=anew&seen=40&anew=true", flow(1)).json["seen"] == 41


def test_a_deleted_stream_is_unknown(service: Live) -> None:
    service.send("stream=deleted", flow(0))
    answer = service.ask("DELETE", "/v1/streams/deleted")
    assert (answer.status, answer.body) == (204, b"")
    assert service.ask("GET", "/v1/streams/deleted").status == 404


def test_released_streams_are_durable_and_go_on(service: Live) -> None:
    service.send("stream=released", flow(0), flow(1))
    assert service.ask("POST", "/v1/release").json["streams"] >= 1
    assert service.ask("GET", "/v1/streams/released").json == {
        "stream": "released", "seen": 2, "durable": 2, "warm": False,
    }  # fmt: skip
    assert service.send("stream=released&seen=2", flow(2)).json["seen"] == 3


def test_after_a_release_each_answer_ends_its_connection(detector: Detector, tmp_path: Path) -> None:
    with live(detector, FolderStore(tmp_path)) as service:
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)) as kept:
            body = json.dumps({"flows": [flow()]}).encode()
            for is_released in (False, True):
                kept.request("POST", "/v1/verdicts", body, {"content-type": JSON})
                answer = kept.getresponse()
                assert (answer.status, bool(answer.read()), answer.will_close) == (200, True, is_released)
                service.ask("POST", "/v1/release")
        assert service.ask("GET", "/v1/nothing").headers["connection"] == "close"


def test_head_is_get_without_a_body_and_options_names_the_methods(service: Live) -> None:
    head = service.ask("HEAD", "/v1/model")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(service.ask("GET", "/v1/model").body)
    options = service.ask("OPTIONS", "/v1/verdicts")
    assert (options.status, options.body, options.headers["allow"]) == (204, b"", "POST, OPTIONS")
    assert service.ask("GET", "/v1/verdicts").headers["allow"] == "POST, OPTIONS"


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.mark.parametrize("path", [path for path in schema.openapi()["paths"] if path not in schema.HEALTH])
def test_every_method_is_answered_as_the_published_interface_says(service: Live, path: str) -> None:
    item = schema.openapi()["paths"][path]
    service.send("stream=known", flow(0))
    for method in METHODS:
        body = json.dumps({"flows": [flow(0)]}).encode() if method == "POST" else None
        answer = service.ask(method, path.replace("{stream}", "known"), body)
        operation = item.get(method.lower())
        assert (answer.status == 405) is (operation is None), method
        if operation is not None:
            assert answer.status in (200, 204) and str(answer.status) in operation["responses"]
            assert set(operation["responses"][str(answer.status)].get("headers", {})) <= {
                name.title().replace("Flowsentry", "FlowSentry") for name in answer.headers
            }


def test_the_model_describes_itself(service: Live, detector: Detector) -> None:
    content = service.ask("GET", "/v1/model").json
    assert (content["model_version"], content["digest"]) == ("7", "d" * 64)
    assert content["detector_digest"] == detector.digest
    assert content["threshold"] == detector.limit
    assert len(content["manifest"]["features"]) == len(detector.manifest.features)
    assert service.ask("GET", "/v1/openapi.json").json == {"openapi": "3.1.0"}


def test_the_token_is_asked_for_before_anything_else(narrow: Live) -> None:
    for authorization in ("", "Bearer", "Bearer wrong", "Basic s3cret", "Bearer s3cret ", "Bearer s3cretx", "Bearer é"):
        answer = narrow.send("nonsense", flow(), authorization=authorization)
        assert (answer.status, answer.json["code"], answer.headers["www-authenticate"]) == (
            401,
            "unauthorized",
            "Bearer",
        )
    assert narrow.ask("GET", "/v1/nowhere").status == 401
    assert narrow.ask("GET", "/v1/nowhere", authorization="Bearer s3cret").status == 404
    assert narrow.send("", flow(), authorization="bearer s3cret").status == 200
    assert narrow.ask("GET", "/metrics").status == 200


def test_too_long_bodies_and_too_many_flows_are_refused(narrow: Live) -> None:
    token = "Bearer s3cret"
    pieces = (b" " * 500 for _ in range(6))
    endless = (b" " * 500 for _ in range(1000))
    for body in (b" " * 2001, b" " * 4001, pieces):
        answer = narrow.ask("POST", "/v1/verdicts", body, authorization=token)
        assert (answer.status, answer.json["code"]) == (413, "too_large")
    with suppress(BrokenPipeError, ConnectionResetError):  # it may be cut off while it still sends
        assert narrow.ask("POST", "/v1/verdicts", endless, authorization=token).status == 413
    answer = narrow.send("", *(flow(n, src_port=None) for n in range(4)), authorization=token)
    assert (answer.status, answer.json["code"]) == (413, "too_large")


def test_a_body_that_trickles_in_times_out(narrow: Live) -> None:
    head = (
        b"POST /v1/verdicts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=5) as client:
        client.sendall(head + b"Content-Length: 100\r\n\r\n")
        begin = time.monotonic()
        for _ in range(20):
            time.sleep(0.05)
            try:
                client.sendall(b" ")
            except OSError:
                break
        received = client.recv(4096)
        assert time.monotonic() - begin < 3
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in received.lower()


def test_a_client_that_goes_away_leaves_nothing_behind(narrow: Live) -> None:
    head = (
        b"POST /v1/verdicts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nContent-Type: application/json\r\n"
    )
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", narrow.port), timeout=5) as client:
            client.sendall(head + b"Content-Length: 1000\r\n\r\n" + b" " * 900)
    deadline = time.monotonic() + 3
    while narrow.app._held and time.monotonic() < deadline:
        time.sleep(0.02)
    assert narrow.app._held == 0
    assert narrow.send("", flow(), authorization="Bearer s3cret").status == 200


class _Gated(FolderStore):
    """A store that answers for one stream only when it is told to, and fails for others."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened, self.asked = threading.Event(), threading.Event()

    def read(self, name: str, most: int | None = None) -> bytes | None:
        if "slow" in name:
            self.asked.set()
            assert self.opened.wait(10)
        if "unreachable" in name:
            raise StoreError("no answer")
        if "broken" in name:
            raise RuntimeError(MARK)
        return super().read(name, most)


@pytest.fixture
def gated(detector: Detector, tmp_path: Path) -> Iterator[tuple[Live, _Gated]]:
    store = _Gated(tmp_path)
    with live(detector, store) as service:
        yield service, store
        store.opened.set()


def test_a_stream_answers_one_request_at_a_time_and_others_go_on(gated: tuple[Live, _Gated]) -> None:
    service, store = gated
    answers: list[Answer] = []
    first = threading.Thread(target=lambda: answers.append(service.send("stream=slow", flow(0))))
    first.start()
    assert store.asked.wait(5)
    second = service.send("stream=slow", flow(1))
    assert (second.status, second.json["code"], second.headers["retry-after"]) == (423, "stream_busy", "1")
    assert service.send("stream=other", flow(0)).status == 200
    store.opened.set()
    first.join()
    assert [a.status for a in answers] == [200]
    assert service.send("stream=slow&seen=1", flow(1)).status == 200


def test_of_long_bodies_one_is_answered_at_a_time_and_short_ones_go_on(gated: tuple[Live, _Gated]) -> None:
    service, store = gated
    answers: dict[str, int] = {}

    def send_long(stream: str) -> None:
        body = json.dumps({"flows": [flow(0)]}).encode() + b" " * LONG_BYTES
        answers[stream] = service.ask("POST", f"/v1/verdicts?stream={stream}", body).status

    threads = [threading.Thread(target=send_long, args=(stream,)) for stream in ("slow", "next")]
    threads[0].start()
    assert store.asked.wait(5)
    threads[1].start()
    for number in range(20):
        assert service.send("stream=short", flow(number)).status == 200
        time.sleep(0.01)
    assert answers == {}
    store.opened.set()
    for thread in threads:
        thread.join()
    assert answers == {"slow": 200, "next": 200}
    assert service.app._held == 0


def test_a_store_that_does_not_answer_is_no_fault_of_the_request(gated: tuple[Live, _Gated]) -> None:
    answer = gated[0].send("stream=unreachable", flow(0))
    assert (answer.status, answer.json["code"], answer.headers["retry-after"]) == (503, "busy", "1")


def test_an_unexpected_error_is_logged_without_its_text_and_the_service_goes_on(
    gated: tuple[Live, _Gated], caplog: pytest.LogCaptureFixture
) -> None:
    service, _ = gated
    with caplog.at_level(logging.INFO, "flowsentry"):
        answer = service.send("stream=broken", flow(0))
    assert (answer.status, answer.json["code"], answer.json["detail"]) == (
        500, "internal", "the request could not be answered",
    )  # fmt: skip
    logged = [vars(record).get("fields", {}) for record in caplog.records]
    assert any(fields.get("error") == "RuntimeError" and fields["traceback"] for fields in logged)
    assert MARK not in str(logged) + answer.body.decode()
    assert service.send("stream=fine", flow(0)).status == 200


def test_refusals_are_logged_but_not_each(service: Live, caplog: pytest.LogCaptureFixture) -> None:
    service.app._quiet.clear()
    with caplog.at_level(logging.INFO, "flowsentry.service"):
        for _ in range(20):
            service.ask("GET", f"/v1/streams/{MARK}")
        service.send("stream=unlogged", flow(0))
    lines = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "request"]
    assert 1 <= len(lines) <= 3
    assert lines[0]["path"] == "/v1/streams/{stream}"
    assert lines[0]["status"] == 404


def test_an_access_log_has_one_line_for_each_request_without_flows(
    detector: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with live(detector, FolderStore(tmp_path), access_log="on") as service, caplog.at_level(logging.INFO, "flowsentry"):
        for number in range(3):
            service.send("stream=seen", flow(number, src_ip="192.0.2.77"), flow(number, bytes=-1))
    lines = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "request"]
    assert [(line["stream"], line["flows"], line["rejected"]) for line in lines] == [("seen", 2, 1)] * 3
    assert "192.0.2.77" not in str(lines)


def _value(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))


def test_metrics_count_flows_verdicts_and_requests(detector: Detector, tmp_path: Path) -> None:
    with live(detector, FolderStore(tmp_path)) as service:
        service.send("seen=0", flow(0), flow(1, src_ip="nowhere"))
        service.send("seen=0", flow(0), flow(1, src_ip="nowhere"))
        service.send("seen=2&absorb=true", flow(2), flow(3))
        service.send("seen=9", flow(4))
        service.send("seen=4&on_bad=reject_batch", flow(4, bytes=-1))
        answer = service.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    assert _value(text, "flowsentry_flows_total") == 2
    verdicts = [_value(text, f'flowsentry_verdicts_total{{label="{label}"}}') for label in ("benign", "malicious")]
    assert sum(verdicts) == 1
    assert _value(text, "flowsentry_score_count") == 1
    assert _value(text, "flowsentry_resent_flows_total") == 2
    assert _value(text, "flowsentry_repeated_requests_total") == 1
    assert _value(text, "flowsentry_streams_open") == 1
    assert _value(text, 'flowsentry_rejected_flows_total{reason="src_ip is not an IPv4 or IPv6 address"}') == 1
    for status, count in ((200, 3), (409, 1), (422, 1)):
        name = f'flowsentry_requests_total{{method="POST",path="/v1/verdicts",status="{status}"}}'
        assert _value(text, name) == count
    assert _value(text, "flowsentry_request_seconds_count") == 5
    assert 'flowsentry_model_info{digest="' in text


def test_one_by_one_in_bodies_and_in_a_thread_the_verdicts_are_the_same(service: Live, small: Small) -> None:
    reports = small.raw.head(400)
    flows = [
        {
            "flow_id": row.flow_id, "src_ip": row.src_ip, "dst_ip": row.dst_ip, "bytes": row.bytes,
            "src_port": None if pd.isna(row.src_port) else int(row.src_port),
            "dst_port": None if pd.isna(row.dst_port) else int(row.dst_port),
            "transport": row.transport, "duration": row.duration, "time": row.time.isoformat(), "final": row.final,
        }
        for row in reports.itertuples()
    ]  # fmt: skip
    whole = service.send("stream=whole-body", *flows).json["verdicts"]
    single = [
        service.send("stream=one-by-one", each).json["verdicts"][0] | {"index": n} for n, each in enumerate(flows)
    ]
    assert len(json.dumps(flows)) > 64_000
    assert single == whole


def test_a_rehearsal_leaves_no_trace(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    count = threading.active_count()
    rehearse(Model(detector, "7", ""))
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == count
