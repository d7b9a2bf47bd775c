"""The service gate against the service's own application on a real socket, and against servers that talk nonsense."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
import uvicorn
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from flowsentry.config import ServiceGateSettings
from flowsentry.detector import Detector, Judged, Tail, Watch
from flowsentry.features.transform import Transform
from flowsentry.learning.candidates import score_fold
from flowsentry.learning.quality_gate import Rule
from flowsentry.reporting.evaluation import validation_scores
from flowsentry.serving import wire
from flowsentry.serving.app import App, Model
from flowsentry.serving.client import Client
from flowsentry.serving.deployer import Endpoint
from flowsentry.serving.protocol import ARROW, JSON
from flowsentry.serving.service_gate import ServiceDecision, _plan, check
from flowsentry.serving.settings import Settings
from flowsentry.serving.store import open_store
from flowsentry.serving.streams import Limits, Streams
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

TOKEN = "a-token"
QUICK = ServiceGateSettings(single_requests=20, max_p99_ms=2000, timeout_seconds=20)


@dataclass(frozen=True)
class Case:
    """A detector with its card, and what it is judged by."""

    detector: Detector
    reports: pd.DataFrame
    flows: pd.DataFrame
    validation: np.ndarray

    def check(self, endpoint: Endpoint, **changed: Any) -> ServiceDecision:
        given: dict[str, Any] = {
            "detector": self.detector,
            "reports": self.reports,
            "flows": self.flows,
            "validation": self.validation,
            "card": self.detector.card,
            "settings": QUICK,
            "model_version": "7",
            "digest": "b" * 64,
        }
        return check(endpoint, **(given | changed))


def make_case(small: Small, view: str, family: str) -> Case:
    detector = trained(small, view, family)
    splits = small.splits if view == "behaviour" else small.paper_splits
    (fold,) = splits.of("random")
    scores = score_fold(detector, small.views[view], splits, fold)
    by_labels = validation_scores(small.flows, splits, {"it": scores})["it"]
    card = {
        "validation": {
            labels: {
                "counts": found.counts.model_dump(),
                "families": {name: share.model_dump() for name, share in found.families.items()},
            }
            for labels, found in by_labels.items()
        }
    }
    return Case(detector.with_card(card), small.reports, small.flows, splits.rows("random", "validation"))


@pytest.fixture(scope="module")
def case(small: Small) -> Case:
    return make_case(small, "behaviour", "tails")


@contextmanager
def serving(detector: Detector, folder: Path, version: str = "7", **changed: Any) -> Iterator[tuple[Endpoint, Streams]]:
    """The service's application in a thread."""
    streams = Streams(detector, open_store(str(folder)), Limits())
    app = App(Model(detector, version, "b" * 64), streams, Settings(state=str(folder), token=TOKEN, **changed), b"{}")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Endpoint(url=f"http://127.0.0.1:{listener.getsockname()[1]}", token=TOKEN), streams
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        app.close()
        streams.close()


@contextmanager
def talking(answer: Callable[[BaseHTTPRequestHandler, bytes], None], model: dict[str, Any]) -> Iterator[Endpoint]:
    """A server that says which model it is and answers flows as it likes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            reply(self, orjson.dumps(model))

        def do_DELETE(self) -> None:
            reply(self, b"", status=204)

        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Endpoint(url=f"http://127.0.0.1:{server.server_port}", token=None)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(
    handler: BaseHTTPRequestHandler, body: bytes, *, status: int = 200, kind: str = JSON, seen: int | None = None
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    if seen is not None:
        handler.send_header("FlowSentry-Seen", str(seen))
        handler.send_header("FlowSentry-Durable", "0")
    handler.end_headers()
    handler.wfile.write(body)


def rule(decision: ServiceDecision, name: str) -> Rule:
    (found,) = [one for one in decision.rules if one.name == name]
    return found


def failed(decision: ServiceDecision) -> set[str]:
    assert decision.passed == all(one.outcome != "failed" for one in decision.rules)
    assert all(one.name in decision.reason for one in decision.rules if one.outcome == "failed")
    assert ServiceDecision.model_validate_json(decision.model_dump_json()) == decision
    return {one.name for one in decision.rules if one.outcome == "failed"}


def pretending(broken: Detector, honest: Detector) -> Detector:
    """A bug does not change what a service says of itself."""
    broken.__dict__["digest"] = honest.digest
    return broken


def test_a_challenger_that_serves_what_was_evaluated_passes(case: Case, tmp_path: Path) -> None:
    told: list[str] = []
    with serving(case.detector, tmp_path) as (endpoint, streams):
        decision = case.check(endpoint, on_progress=told.append)
        assert len(streams) == 0
    assert failed(decision) == set()
    assert (decision.answered, decision.flows) == (len(case.reports), len(case.flows))
    assert decision.offline == decision.served
    assert decision.served["corrected"].counts.tp > 0
    assert decision.latency.requests >= 20
    assert decision.differences == ()
    assert told
    assert list(tmp_path.rglob("gate-*")) == []


def test_the_view_of_the_study_passes_too(small: Small, tmp_path: Path) -> None:
    paper = make_case(small, "paper", "gradient_boosting")
    with serving(paper.detector, tmp_path) as (endpoint, _):
        decision = paper.check(endpoint)
    assert failed(decision) == set()


def test_every_recording_is_a_stream_of_its_own(small: Small, case: Case, tmp_path: Path) -> None:
    count = len(small.flows)
    other = small.reports.assign(recording="other", file="other.csv", flow=small.reports["flow"] + count)
    reports = pd.concat([small.reports, other], ignore_index=True).astype({"recording": "category", "file": "category"})
    flows = pd.concat([small.flows, small.flows.set_axis(small.flows.index + count)])
    with serving(case.detector, tmp_path) as (endpoint, _):
        decision = case.check(endpoint, reports=reports, flows=flows)
    assert failed(decision) == set()
    assert decision.answered == 2 * len(small.reports)


def test_another_limit_is_found(case: Case, tmp_path: Path) -> None:
    broken = pretending(replace(case.detector, target_fpr=0.01), case.detector)
    with serving(broken, tmp_path) as (endpoint, _):
        decision = case.check(endpoint)
    assert failed(decision) >= {"same model", "same thresholds"}
    assert rule(decision, "same scores").outcome == "passed"
    assert "threshold 2.0 instead of 3.0" in rule(decision, "same model").words
    assert "every verdict differs" in rule(decision, "same thresholds").words
    assert decision.differing["threshold"] == len(case.flows)


def test_another_transform_is_found_and_the_first_differing_flows_are_listed(case: Case, tmp_path: Path) -> None:
    given = case.detector.transform.model_dump()
    moved = Transform.model_validate(given | {"high": [3 * value + 1 for value in given["high"]]})
    broken = pretending(replace(case.detector, transform=moved), case.detector)
    with serving(broken, tmp_path) as (endpoint, _):
        decision = case.check(endpoint)
    assert "same scores" in failed(decision)
    assert rule(decision, "same model").outcome == rule(decision, "same thresholds").outcome == "passed"
    assert 0 < len(decision.differences) <= 20
    assert len({one.flow for one in decision.differences}) == len(decision.differences)
    first = decision.differences[0]
    offline = case.detector.verdicts(case.reports)
    at = case.reports.index[case.reports["row"].eq(int(first.report.rpartition(":")[2]))][0]
    assert first.report == f"{case.reports['file'][at]}:{case.reports['row'][at]}"
    assert first.expected.anomaly_score == offline["anomaly_score"][at] != first.got.anomaly_score
    assert first.report in rule(decision, "same scores").words
    figures = rule(decision, "figures of the card, corrected labels")
    assert figures.outcome == "failed"
    assert " instead of " in figures.words


def test_a_model_that_says_the_same_of_every_flow_is_found(case: Case, tmp_path: Path) -> None:
    constant = replace(case.detector, tail=Tail(scores=[1e9], surprises=[0.0], excess=1.0))
    with serving(pretending(constant, case.detector), tmp_path) as (endpoint, _):
        decision = case.check(endpoint)
    assert failed(decision) >= {"no constant", "same labels", "same scores", "same first alarms"}
    assert rule(decision, "no constant").words == "1 different score and only the label benign"
    assert decision.served["corrected"].recall == 0


def test_another_model_under_the_same_version_is_found(small: Small, case: Case, tmp_path: Path) -> None:
    with serving(trained(small, family="effects"), tmp_path, version="6") as (endpoint, _):
        decision = case.check(endpoint, digest="c" * 64)
    words = rule(decision, "same model").words
    assert failed(decision) >= {"same model", "same scores"}
    for said in ("model version 6 instead of 7", "digest of the detector", "digest of the bundle bbbb"):
        assert said in words


def renamed(judged: Judged, **changed: str) -> Judged:
    """What a service says whose view words everything otherwise."""
    manifest = judged.detector.manifest
    features = tuple(feature.model_copy(update=changed) for feature in manifest.features)
    detector = replace(judged.detector, manifest=manifest.model_copy(update={"features": features}))
    detector = replace(detector, model=replace(detector.model))  # reasons are known by the model
    return replace(judged, detector=detector)


@pytest.mark.parametrize(
    ("change", "rules", "words"),
    [
        (lambda head, judged, ids: (replace(head, model_version="6"), judged, ids), {"same versions"}, "version 6"),
        (lambda head, judged, ids: (replace(head, view_version="0"), judged, ids), {"same versions"}, "version 0"),
        (lambda head, judged, ids: (head, judged, ids[-1:] + ids[:-1]), {"same flow ids"}, " not "),
        (
            lambda head, judged, ids: (head, renamed(judged, anomaly="dns-tunnel"), ids),
            {"same anomaly types"},
            ": dns-tunnel not ",
        ),
        (
            lambda head, judged, ids: (head, renamed(judged, window="7s"), ids),
            {"same baseline windows"},
            ": 7s not ",
        ),
        (
            lambda head, judged, ids: (head, renamed(judged, description="something"), ids),
            {"same reasons"},
            "(something: ",
        ),
    ],
)
def test_what_a_verdict_is_signed_with_and_how_it_is_explained_counts_too(
    case: Case, change: Callable[..., tuple[wire.Head, Judged, list[str]]], rules: set[str], words: str
) -> None:
    """A service whose scores are right; at the first flows nothing is wrong yet."""
    detector = case.detector
    watches: dict[str, Watch] = {}

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        kind, stream = handler.headers["Content-Type"], handler.path.partition("stream=")[2].partition("&")[0]
        batch = wire.parse(body, kind, max_flows=100_000, now_ms=1 << 42)
        watch = watches.setdefault(stream, detector.watch())
        judged = watch.take(batch.columns)
        seen, view = watch.stream.seen, detector.manifest
        head = wire.Head(stream, seen, 0, "7", view.name, view.version, detector.limit)
        if seen > 100:
            head, judged, ids = change(head, judged, batch.flow_ids)
            batch = replace(batch, flow_ids=ids)
        reply(handler, wire.answer(kind, head, judged, batch), kind=kind, seen=seen)

    with talking(answer, {}) as endpoint:
        decision = case.check(endpoint, digest=None)
    assert failed(decision) == rules
    (name,) = rules
    assert words in rule(decision, name).words
    first = decision.differences[0]
    assert first.expected.words(first.kinds[0]) != first.got.words(first.kinds[0])
    assert first.expected.anomaly_score == first.got.anomaly_score


def test_figures_that_are_not_those_of_the_card_are_named(case: Case, tmp_path: Path) -> None:
    card = orjson.loads(orjson.dumps(case.detector.card))
    family, share = next(iter(card["validation"]["corrected"]["families"].items()))
    share.update(flagged=0, rate=0.0, flows=share["flows"] + 1)
    with serving(case.detector, tmp_path) as (endpoint, _):
        decision = case.check(endpoint, card=card)
        without = case.check(endpoint, card={})
    assert failed(decision) == failed(without) == {"figures of the card, corrected labels"}
    assert f"recall of {family} " in decision.reason
    assert f"instead of 0.0000 (0 of {share['flows']:,})" in decision.reason
    assert "the model card has no figures" in without.reason


def test_rejected_flows_are_lost_flows(case: Case, tmp_path: Path) -> None:
    long = case.reports["flow_id"].where(case.reports["flow"] != 5, "x" * 300)
    with serving(case.detector, tmp_path) as (endpoint, _):
        decision = case.check(endpoint, reports=case.reports.assign(flow_id=long))
    lost = rule(decision, "nothing lost")
    assert lost.outcome == "failed"
    assert lost.figures["rejected"] == lost.figures["lost"] == case.reports["flow"].eq(5).sum()
    assert "flow_id is longer than 256 characters" in lost.words


def test_a_request_that_is_refused_ends_the_trial_with_its_place(case: Case, tmp_path: Path) -> None:
    with serving(case.detector, tmp_path, flows=50) as (endpoint, _):
        decision = case.check(endpoint)
        intruder = case.check(endpoint.model_copy(update={"token": "another"}))
    assert failed(decision) == {"answers", "nothing lost"}
    assert "413" in rule(decision, "answers").words
    assert f"{case.reports['file'][0]}:" in rule(decision, "answers").words
    assert decision.answered < len(case.reports)
    assert "401" in rule(intruder, "answers").words
    assert rule(intruder, "same model").outcome == "not decided"
    assert TOKEN not in decision.model_dump_json()


def test_a_slow_challenger_is_found_without_waiting_for_all_of_it(case: Case, tmp_path: Path) -> None:
    slow = QUICK.model_copy(update={"max_p99_ms": 1e-6, "single_requests": 200})
    with serving(case.detector, tmp_path) as (endpoint, _):
        decision = case.check(endpoint, settings=slow)
    assert failed(decision) == {"latency"}
    assert "p99" in rule(decision, "latency").words
    assert decision.latency.requests < 10
    assert decision.answered == len(case.reports)


def test_without_one_class_among_the_validation_flows_nothing_can_be_said(case: Case, tmp_path: Path) -> None:
    malicious = case.flows.loc[case.validation, "corrected"].eq("malicious").to_numpy(bool)
    one = case.flows.loc[case.validation, "family"].eq("port-scan").to_numpy(bool)
    assert one.any()
    with serving(case.detector, tmp_path) as (endpoint, _):
        benign = case.check(endpoint, validation=case.validation[~malicious])
        family = case.check(endpoint, validation=case.validation[~one])
    assert "both classes" in failed(benign)
    assert "without malicious flows nothing can be said" in rule(benign, "both classes").words
    assert "both classes" not in failed(family)
    assert "port-scan" in rule(family, "both classes").words


def test_nobody_there_is_a_failed_gate(case: Case) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    decision = case.check(Endpoint(url=url, token=None))
    assert failed(decision) == {"answers", "nothing lost"}
    assert "does not answer" in decision.reason


def hang(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    time.sleep(1.0)
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def break_down(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    reply(handler, b"<b>oh</b>", status=500, kind="text/html")


def say_nothing(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    reply(handler, b"", seen=1)


def talk_nonsense(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    reply(handler, b'["verdicts"]', seen=_end(handler, body))


def answer_texts(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    reply(handler, b'{"verdicts": ["a", "b"], "rejected": []}', seen=_end(handler, body))


def answer_one_flow_only(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    verdict = {"index": 0, "label": "benign", "anomaly_score": 0.0}
    reply(handler, orjson.dumps({"verdicts": [verdict], "rejected": []}), seen=_end(handler, body))


def answer_no_numbers(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """Arrow can carry what JSON cannot."""
    count = _count(handler, body)
    row = {"label": "benign", "anomaly_score": float("nan"), "threshold": 3.0, "warm": True, "model_version": "7"}
    row |= {"flow_id": "a", "view_version": "1", "reasons": []}
    row |= dict.fromkeys(["first_alarm", "rejected", "anomaly_type", "baseline_window"])
    table = pa.Table.from_pylist([{"index": i, **row} for i in range(count)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    reply(handler, sink.getvalue().to_pybytes(), kind=ARROW, seen=_end(handler, body))


def _count(handler: BaseHTTPRequestHandler, body: bytes) -> int:
    kind = handler.headers["Content-Type"]
    return wire.parse(body, kind, max_flows=100_000, now_ms=1 << 42).count


def _end(handler: BaseHTTPRequestHandler, body: bytes) -> int:
    seen = int(handler.path.partition("seen=")[2].partition("&")[0] or 0)
    return seen + _count(handler, body)


@pytest.mark.parametrize(
    "answer",
    [
        hang,
        hang_up,
        break_down,
        say_nothing,
        talk_nonsense,
        answer_texts,
        answer_one_flow_only,
        answer_no_numbers,
    ],
)
def test_a_challenger_that_answers_otherwise_fails_and_nothing_is_raised(
    case: Case, answer: Callable[[BaseHTTPRequestHandler, bytes], None]
) -> None:
    impatient = QUICK.model_copy(update={"timeout_seconds": 0.3})
    with talking(answer, {"model_version": "7", "manifest": [], "card": "\x1b[2J"}) as endpoint:
        decision = case.check(endpoint, settings=impatient)
    assert failed(decision) == {"answers", "nothing lost", "same model"}
    assert decision.answered == 0
    assert decision.reason.isprintable()


@pytest.mark.parametrize("model", [{}, {"manifest": None}, {"model_version": ["<script>", "\x1b[31m"] * 1000}])
def test_whatever_a_challenger_says_of_itself_ends_up_on_one_short_line(case: Case, model: dict[str, Any]) -> None:
    with talking(hang_up, model) as endpoint:
        decision = case.check(endpoint)
    assert not decision.passed
    assert decision.reason.isprintable()
    assert len(decision.reason) < 2000


def test_nothing_is_sent_twice(case: Case) -> None:
    """A challenger that has dropped a request would get it again from any other client."""
    received: list[str] = []

    def count(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        received.append(handler.path)
        hang_up(handler, body)

    with talking(count, {"model_version": "7"}) as endpoint:
        case.check(endpoint)
        with Client(endpoint.url, patience=0.0) as client:
            assert client.model() == {"model_version": "7"}
    assert len(received) == 1


@given(
    ticks=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    wanted=st.integers(1, 300),
    largest=st.integers(1, 1000),
)
@examples(max_examples=100, deadline=None)
def test_requests_hold_every_report_once_and_in_order(ticks: list[int], wanted: int, largest: int) -> None:
    tick = np.repeat(np.arange(len(ticks)), ticks)
    plan = list(_plan(tick, wanted, largest))
    assert [request.begin for request, _ in plan] == [0, *(request.end for request, _ in plan[:-1])]
    assert plan[-1][0].end == len(tick)
    assert all(request.begin < request.end for request, _ in plan)
    assert sum(request.end - request.begin for request, is_burst in plan if is_burst) >= 1


def test_requests_are_of_one_flow_of_a_tick_and_of_thousands_in_both_formats() -> None:
    tick = np.repeat(np.arange(600), 80)
    plan = list(_plan(tick, 200, 5000))
    bursts = [request for request, is_burst in plan if is_burst]
    others = [request for request, is_burst in plan if not is_burst]
    sizes = {
        kind: {request.end - request.begin for request in others if request.media_type == kind}
        for kind in (JSON, ARROW)
    }
    assert sum(request.end - request.begin for request in bursts) == 200
    assert bursts[0].begin < 4800
    assert bursts[-1].end > 40_000
    for of_kind in sizes.values():
        assert min(of_kind) <= 80
        assert max(of_kind) > 2000
