from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from flowsentry.detector import Detector
from flowsentry.errors import ConfigError, ServiceError
from flowsentry.flows.columns import Columns
from flowsentry.serving import wire
from flowsentry.serving.client import Client, Reply, StreamClient, as_rows, encode
from flowsentry.serving.protocol import ARROW, JSON, NDJSON, SeenMismatch
from flowsentry.serving.streams import Limits, Streams
from tests.flowsentry.serving.local_service import LATER_MS, ListStore, View, offline, post, reply, told
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

SELDOM = Limits(streams=4, checkpoint_flows=1 << 40, checkpoint_seconds=1e6)


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small)


@pytest.fixture(scope="module")
def reports(small: Small) -> pd.DataFrame:
    return small.raw


@pytest.fixture(scope="module")
def expected(detector: Detector, reports: pd.DataFrame) -> list[tuple[Any, ...]]:
    return offline(detector, reports)


# Encoding


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW])
@pytest.mark.parametrize("part", [slice(None), slice(100, 101)])
def test_a_table_on_the_wire_is_what_the_offline_path_reads(
    reports: pd.DataFrame, media_type: str, part: slice
) -> None:
    flows = reports.iloc[part]
    batch = wire.parse(encode(flows, media_type), media_type, max_flows=10_000, now_ms=LATER_MS)
    assert batch.rejected == [] and batch.count == len(flows)
    here = Columns.of(flows)
    for name in (
        "time",
        "flow_id",
        "src_ip",
        "dst_ip",
        "final",
        "src_port",
        "dst_port",
        "transport",
        "bytes",
        "duration",
        "payload",
    ):
        assert np.array_equal(getattr(batch.columns, name), getattr(here, name)), name


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW])
def test_missing_values_and_fine_times_survive(reports: pd.DataFrame, media_type: str) -> None:
    flows = reports.iloc[:20].copy()
    flows.loc[flows.index[3], ["src_port", "dst_port", "packets"]] = pd.NA
    flows["transport"] = flows["transport"].astype(object)
    flows.loc[flows.index[3:5], "transport"] = ["icmp", None]
    flows["transport"] = flows["transport"].astype("category")
    flows["time"] = flows["time"] + pd.Timedelta(microseconds=7)
    batch = wire.parse(encode(flows, media_type), media_type, max_flows=20, now_ms=LATER_MS)
    assert batch.rejected == []
    assert batch.columns.dst_port[3] == 0 and batch.columns.transport[4] == 0
    assert batch.columns.table()["time"].tolist() == flows["time"].tolist()


def test_flows_of_the_interface_are_sent_as_they_are() -> None:
    rows = [{"flow_id": "a", "time": 1}, {"flow_id": "b", "time": 2}]
    assert orjson.loads(encode(rows, JSON)) == {"flows": rows}
    assert [orjson.loads(line) for line in encode(rows, NDJSON).splitlines()] == rows
    with pytest.raises(TypeError):
        encode(rows, ARROW)
    with pytest.raises(ValueError, match="not sent as"):
        encode(rows, "text/csv")


# HTTP


@dataclass
class Script:
    """What a scripted server answers, one entry a request: (status, headers, body), "close" (after reading the
    request, without an answer), or "half" (half an answer).
    """

    answers: list[Any] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    connections: int = 0
    url: str = ""


@pytest.fixture
def script() -> Iterator[Script]:
    scripted = Script()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            scripted.connections += 1
            super().setup()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            scripted.requests.append((self.command, self.path, dict(self.headers), body))
            what = scripted.answers.pop(0)
            if what == "close":
                self.close_connection = True
                return
            status, headers, content = (200, {}, b"x" * 1000) if what == "half" else what
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:10] if what == "half" else content)
            self.close_connection = self.close_connection or what == "half"

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield scripted
    server.shutdown()
    thread.join()
    server.server_close()


VERDICTS = (200, {"Content-Type": JSON, "FlowSentry-Seen": "9", "FlowSentry-Durable": "4"}, b'{"verdicts": []}')


def problem(status: int, **content: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/problem+json"}, json.dumps(content).encode()


def test_a_request_says_what_is_meant_and_the_connection_is_kept(script: Script) -> None:
    script.answers = [VERDICTS, (200, {"Content-Type": JSON}, b'{"model_version": "7"}')]
    with Client(script.url + "/", token="s3cret") as client:
        answer = client.post_verdicts(b"flows", media_type=NDJSON, accept=JSON, stream="a.b", seen=5, absorb=True)
        assert (answer.seen, answer.durable, answer.media_type) == (9, 4, JSON)
        assert client.model() == {"model_version": "7"}
    (method, path, headers, body), (_, model_path, _, _) = script.requests
    assert (method, body, model_path, script.connections) == ("POST", b"flows", "/v1/model", 1)
    assert path == "/v1/verdicts?stream=a.b&absorb=true&anew=false&on_bad=reject_rows&seen=5"
    assert (headers["Authorization"], headers["Content-Type"], headers["Accept"]) == ("Bearer s3cret", NDJSON, JSON)


@pytest.mark.parametrize(
    "failure", ["close", "half", (503, {"Retry-After": "0"}, b""), problem(408), problem(423), (502, {}, b"")]
)
def test_passing_trouble_is_tried_again(script: Script, failure: Any) -> None:
    script.answers = [failure, failure, VERDICTS]
    with Client(script.url) as client:
        assert client.post_verdicts(b"flows", seen=5).seen == 9
    assert len(script.requests) == 3
    assert len({request[3] for request in script.requests}) == 1


@pytest.mark.parametrize("failure", ["close", "half", problem(408, code="timeout"), (502, {}, b"")])
def test_flows_without_a_position_are_not_sent_twice(script: Script, failure: Any) -> None:
    script.answers = [failure]
    with Client(script.url) as client, pytest.raises(ServiceError):
        client.post_verdicts(b"flows")
    assert len(script.requests) == 1


def test_patience_ends(script: Script) -> None:
    script.answers = [problem(423)] * 100
    with (
        Client(script.url, patience=0.3) as client,
        pytest.raises(ServiceError, match=r"answers 423, tried for 0\.3 s"),
    ):
        client.post_verdicts(b"flows", seen=0)
    assert 2 <= len(script.requests) <= 6


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = Client(url, patience=0.1)
    assert not client.ready()
    with pytest.raises(ServiceError, match=r"does not answer .*refused"):
        client.model()


def test_a_service_that_says_nothing_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1, patience=0.1)
        with pytest.raises(ServiceError, match="timed out"):
            client.model()


def test_another_position_is_told(script: Script) -> None:
    script.answers = [problem(409, code="seen_mismatch", seen=3, durable=2)]
    with Client(script.url) as client, pytest.raises(SeenMismatch) as elsewhere:
        client.post_verdicts(b"flows", seen=5)
    assert (elsewhere.value.seen, elsewhere.value.durable) == (3, 2)


def test_a_refusal_names_code_and_detail_without_control_characters(script: Script) -> None:
    script.answers = [problem(401, code="unauthorized", detail="a token\x1b[31m is needed")]
    with Client(script.url) as client, pytest.raises(ServiceError, match="401, 'unauthorized'") as refusal:
        client.post_verdicts(b"flows")
    assert "\x1b" not in str(refusal.value) and "is needed" in str(refusal.value)


def test_redirects_are_not_followed(script: Script) -> None:
    script.answers = [(307, {"Location": f"{script.url}/elsewhere"}, b"")]
    with Client(script.url, token="s3cret") as client, pytest.raises(ServiceError, match="redirects"):
        client.post_verdicts(b"flows", seen=0)
    assert len(script.requests) == 1


@pytest.mark.parametrize("answer", [(200, {}, b""), (200, {"FlowSentry-Seen": "x", "FlowSentry-Durable": "1"}, b"")])
def test_an_answer_of_something_else_is_refused(script: Script, answer: Any) -> None:
    script.answers = [answer]
    with Client(script.url) as client, pytest.raises(ServiceError, match="FlowSentry service"):
        client.post_verdicts(b"flows", seen=0)


def test_streams_are_asked_for_released_and_deleted(script: Script) -> None:
    script.answers = [
        (200, {"Content-Type": JSON}, b'{"stream": "a", "seen": 3}'),
        problem(404),
        (204, {}, b""),
        problem(404),
        (200, {"Content-Type": JSON}, b'{"streams": 2}'),
        (200, {}, b""),
        (503, {}, b""),
    ]
    with Client(script.url) as client:
        assert client.stream_status("a") == {"stream": "a", "seen": 3}
        assert client.stream_status("../b") is None
        client.delete_stream("a")
        client.delete_stream("a")
        assert client.release() == 2
        assert client.ready() and not client.ready()
    assert [request[:2] for request in script.requests[:3]] == [
        ("GET", "/v1/streams/a"),
        ("GET", "/v1/streams/..%2Fb"),
        ("DELETE", "/v1/streams/a"),
    ]


def test_a_refusal_before_the_whole_body_was_sent_is_read() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def refuse() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(
                b"HTTP/1.1 413 Too Large\r\nContent-Type: application/problem+json\r\nContent-Length: 20\r\n"
                b'Connection: close\r\n\r\n{"code":"too_large"}'
            )
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
            connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        client = Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with client, pytest.raises(ServiceError, match="413, 'too_large'"):
            client.post_verdicts(bytes(20_000_000), seen=0)
        thread.join()


@pytest.mark.parametrize("url", ["", "localhost:3000", "ftp://x", "http://", "http://me:pw@host", "http://host:port"])
def test_what_is_no_address_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="address of a service") as refusal:
        Client(url)
    assert "pw" not in str(refusal.value)


# The stream protocol


class Lossy:
    """A service that loses answers and dies as told, and a client's patience with it."""

    def __init__(self, detector: Detector, store: ListStore | None = None) -> None:
        self.store = store or ListStore()
        self.losses: list[str] = []
        """What happens to the next requests: "answer" (lost), "before" and "after" (killed then), "" (nothing)."""
        self.posts: list[tuple[int, bool, bool]] = []
        """Position, absorb, anew of every request."""
        self._detector = detector
        self._view = View(self.store)
        self.streams = Streams(detector, self._view, SELDOM)

    def kill(self) -> None:
        """A new process takes over with what the store holds."""
        self._view.is_cut = True
        self.streams.close()
        self._view = View(self.store)
        self.streams = Streams(self._detector, self._view, SELDOM)

    def post_verdicts(self, body: bytes, *, media_type: str, stream: str, seen: int, absorb: bool, anew: bool) -> Reply:
        while True:
            loss = self.losses.pop(0) if self.losses else ""
            if loss == "before":
                self.kill()
            self.posts.append((seen, absorb, anew))
            taken = post(self.streams, body, media_type=media_type, stream=stream, seen=seen, absorb=absorb, anew=anew)
            if loss == "after":
                self.kill()
            if loss == "checkpoint, after":
                self.streams.checkpoint()
                self.kill()
            if loss in {"", "before"}:
                return reply(taken, media_type)


@pytest.fixture
def lossy(detector: Detector) -> Iterator[Lossy]:
    service = Lossy(detector)
    yield service
    service.streams.close()


def verdicts(answers: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [told(answer) for answer in answers]


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW])
def test_every_flow_gets_its_offline_verdict(
    lossy: Lossy, reports: pd.DataFrame, expected: list[tuple[Any, ...]], media_type: str
) -> None:
    client = StreamClient(lossy, "s", media_type=media_type)
    assert client.send(reports.iloc[:0]).rows() == []
    rows = []
    for i in range(0, len(reports), 800):
        answers = client.send(reports.iloc[i : i + 800])
        assert answers.first == i
        rows += answers.rows()
    assert verdicts(rows) == expected
    assert len(lossy.posts) == 5 and client.resent == 0


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW])
def test_a_rejected_flow_has_its_line_among_the_answers(lossy: Lossy, reports: pd.DataFrame, media_type: str) -> None:
    flows = reports.iloc[:5].copy()
    flows.loc[flows.index[2], "bytes"] = -1
    rows = StreamClient(lossy, "s", media_type=media_type).send(flows).rows()
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [bool(row.get("rejected")) for row in rows] == [False, False, True, False, False]
    assert set(rows[2]) == {"index", "rejected"}


def test_what_a_killed_service_lost_is_absorbed_without_second_verdicts(
    lossy: Lossy, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    client = StreamClient(lossy, "s", resend=250)
    rows = client.send(reports.iloc[:1000]).rows()
    lossy.streams.checkpoint()
    rows += client.send(reports.iloc[1000:1600]).rows()
    lossy.losses = ["before"]
    rows += client.send(reports.iloc[1600:]).rows()
    assert verdicts(rows) == expected
    assert client.resent == 600
    resent = [position for position, absorb, _ in lossy.posts if absorb]
    assert resent == [1000, 1250, 1500]


def test_what_is_durable_is_not_kept(lossy: Lossy, reports: pd.DataFrame) -> None:
    client = StreamClient(lossy, "s")
    for i in range(0, 1000, 100):
        client.send(reports.iloc[i : i + 100])
    assert (client.kept, client.seen) == (1000, 1000)
    lossy.streams.checkpoint()
    client.send(reports.iloc[1000:1100])
    assert client.kept == 100


def test_no_more_is_kept_than_allowed_and_a_service_further_behind_is_an_error(
    lossy: Lossy, reports: pd.DataFrame
) -> None:
    client = StreamClient(lossy, "s", keep=300)
    for i in range(0, 1000, 100):
        client.send(reports.iloc[i : i + 100])
        assert client.kept <= 300
    lossy.losses = ["before"]
    with pytest.raises(ServiceError, match="has seen 0 flows, and those before 700 are no longer kept"):
        client.send(reports.iloc[1000:1100])
    assert client.seen == 1000


@pytest.mark.parametrize(("keep", "from_"), [(300, 700), (0, 1000)])
def test_a_stream_begins_anew_with_what_is_kept_if_that_is_allowed(
    lossy: Lossy, detector: Detector, reports: pd.DataFrame, keep: int, from_: int
) -> None:
    client = StreamClient(lossy, "s", keep=keep, anew=True)
    for i in range(0, 1000, 100):
        client.send(reports.iloc[i : i + 100])
    lossy.losses = ["before"]
    rows = client.send(reports.iloc[1000:1200]).rows()
    assert verdicts(rows) == offline(detector, reports.iloc[from_:1200])[-200:]
    assert client.seen == 1200
    assert [anew for _, _, anew in lossy.posts].count(True) == 1


def test_a_service_that_is_ahead_is_an_error_unless_the_stream_may_begin_anew(
    lossy: Lossy, detector: Detector, reports: pd.DataFrame
) -> None:
    StreamClient(lossy, "s").send(reports.iloc[:500])
    with pytest.raises(ServiceError, match="more than the 0 of this client"):
        StreamClient(lossy, "s").send(reports.iloc[:100])
    rows = StreamClient(lossy, "s", anew=True).send(reports.iloc[:100]).rows()
    assert verdicts(rows) == offline(detector, reports.iloc[:100])


def test_a_new_client_goes_on_where_an_earlier_one_ended(
    lossy: Lossy, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    rows = StreamClient(lossy, "s").send(reports.iloc[:1000]).rows()
    lossy.kill()
    following = StreamClient(lossy, "s", seen=1000, before=reports.iloc[:1000])
    rows += following.send(reports.iloc[1000:]).rows()
    assert verdicts(rows) == expected
    with pytest.raises(ValueError, match="more flows before"):
        StreamClient(lossy, "s", seen=1000, before=reports.iloc[:1001])


def test_lists_and_tables_may_take_turns(lossy: Lossy, reports: pd.DataFrame, expected: list[tuple[Any, ...]]) -> None:
    client = StreamClient(lossy, "s")
    rows = client.send(as_rows(reports.iloc[:300])).rows() + client.send(reports.iloc[300:600]).rows()
    lossy.losses = ["before"]
    rows += client.send(as_rows(reports.iloc[600:900])).rows()
    assert verdicts(rows) == expected[:900]


class Faulty:
    """Answers as told."""

    def __init__(self, answer: Callable[[int], Reply]) -> None:
        self._answer = answer

    def post_verdicts(self, body: bytes, *, seen: int, **_: Any) -> Reply:
        return self._answer(seen)


def test_a_service_that_never_gets_anywhere_is_given_up(reports: pd.DataFrame) -> None:
    def lose(seen: int) -> Reply:
        raise SeenMismatch(0, 0)

    client = StreamClient(Faulty(lambda seen: Reply(b"", JSON, seen + 5, 0)), "s")
    client.send(reports.iloc[:5])
    client._client = Faulty(lose)
    with pytest.raises(ServiceError, match="again and again"):
        client.send(reports.iloc[5:10])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"verdicts": [], "rejected": []}',
        b'{"verdicts": [{"index": 0}, {"index": 0}], "rejected": []}',
        b'{"verdicts": [{"index": 0}], "rejected": [{"index": 2, "reason": ""}]}',
        b'{"verdicts": [{}, {}], "rejected": []}',
        b'{"verdicts": [1, 2], "rejected": []}',
    ],
)
def test_an_answer_that_leaves_a_flow_out_is_refused(reports: pd.DataFrame, body: bytes) -> None:
    client = StreamClient(Faulty(lambda seen: Reply(body, JSON, seen + 2, 0)), "s")
    with pytest.raises(ServiceError, match="another version"):
        client.send(reports.iloc[:2]).rows()


def test_a_service_that_counts_otherwise_is_refused(reports: pd.DataFrame) -> None:
    client = StreamClient(Faulty(lambda seen: Reply(b"", JSON, seen + 1, 0)), "s")
    with pytest.raises(ServiceError, match="counts 1 flows, not 2"):
        client.send(reports.iloc[:2])


def test_whatever_happens_every_flow_gets_its_offline_verdict_once(
    detector: Detector, reports: pd.DataFrame, expected: list[tuple[Any, ...]]
) -> None:
    rows = as_rows(reports)

    class Life(RuleBasedStateMachine):
        """A client and a service: requests, lost answers, kills, checkpoints, evictions, a second replica."""

        @initialize(resend=st.integers(1, 400))
        def begin(self, resend: int) -> None:
            self.service = Lossy(detector)
            self.replica = Lossy(detector, self.service.store)
            self.client = StreamClient(self.service, "s", resend=resend)
            self.got: list[dict[str, Any]] = []

        @rule(
            count=st.integers(1, 300),
            losses=st.lists(st.sampled_from(["", "answer", "before", "after", "checkpoint, after"]), max_size=4),
        )
        def send(self, count: int, losses: list[str]) -> None:
            self.service.losses = list(losses)
            begin = len(self.got)
            self.got += self.client.send(rows[begin : begin + count]).rows()
            assert self.client.seen == len(self.got)

        @rule()
        def checkpoint(self) -> None:
            self.service.streams.checkpoint()

        @rule()
        def kill(self) -> None:
            self.service.kill()

        @rule()
        def evict(self) -> None:
            for number in range(4):
                post(self.service.streams, b'{"flows": []}', stream=f"e{number}", seen=None, absorb=False, anew=False)
            assert not self.service.streams.is_open("s")

        @rule()
        def release(self) -> None:
            self.service.streams.release()

        @rule(is_written=st.booleans())
        def switch(self, is_written: bool) -> None:
            """Requests go to another replica from now on."""
            if is_written:
                self.service.streams.checkpoint()
            self.service, self.replica = self.replica, self.service
            self.client._client = self.service

        def teardown(self) -> None:
            for service in (self.service, self.replica):
                service.streams.close()
            assert verdicts(self.got) == expected[: len(self.got)]

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_connection_that_was_idle_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            accepted.append(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Client(f"http://127.0.0.1:{server.server_address[1]}") as client:
            client.model()
            client.model()
            monkeypatch.setattr("flowsentry.serving.client._IDLE_SECONDS", -1.0)
            client.model()
    finally:
        server.shutdown()
        server.server_close()
    assert accepted[0] == accepted[1] != accepted[2]
