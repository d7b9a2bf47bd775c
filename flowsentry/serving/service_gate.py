"""The service gate: what a challenger answers through its own endpoint is what was evaluated, and it answers in time.

All reports of the recordings go through the endpoint in arrival order, in requests of one flow, of a tick and of
thousands, as JSON and as Arrow. Every verdict is compared with the offline one, score and threshold bit for bit, with
its reasons and what it is signed with. Nothing is sent twice: a challenger that loses a request or dies has failed. A
bad challenger never raises; it gets a decision that says what is wrong with it.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import numpy as np
import pandas as pd
from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, JsonValue, Strict, TypeAdapter, ValidationError

from flowsentry.config import ServiceGateSettings
from flowsentry.detector import Detector
from flowsentry.errors import ServiceError
from flowsentry.flows.columns import Columns
from flowsentry.flows.schema import BENIGN, MALICIOUS, TICK_SECONDS
from flowsentry.learning.quality_gate import Outcome, Rule, truth
from flowsentry.reporting.evaluation import LABEL_COLUMNS
from flowsentry.reporting.metrics import Bools, Counts, Floats, Frozen, Ints, Share, count, share
from flowsentry.reporting.results import LABELS, Labels
from flowsentry.reporting.tables import plain
from flowsentry.serving.client import Answers, Client, encode
from flowsentry.serving.deployer import Deployer, Endpoint
from flowsentry.serving.protocol import ARROW, JSON

LISTED: Final = 20
"""Differing verdicts that a decision lists."""
BURST: Final = 10
"""Requests with one flow in a row; the bursts are spread over the recordings."""
_TICK_MS: Final = TICK_SECONDS * 1000
_SAID: Final = 5
_LONGEST: Final = 1000
"""Characters of any text of an answer."""

Kind = Literal[
    "label", "score", "threshold", "warm", "first alarm", "flow id", "version", "anomaly type", "window", "reasons"
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


class Said(Frozen):
    """A reason as a verdict gives it."""

    model_config = ConfigDict(extra="ignore")

    feature: Annotated[str, Field(max_length=_LONGEST)]
    value: Annotated[float, AllowInfNan(False)] | None
    unit: Annotated[str, Field(max_length=_LONGEST)]
    share: Annotated[float, AllowInfNan(False)]
    text: Annotated[str, Field(max_length=_LONGEST)]


class Verdict(Frozen):
    """What is compared of a verdict: everything."""

    label: str
    anomaly_score: float
    threshold: float
    warm: bool
    first_alarm: str | None
    flow_id: str
    model_version: str
    view_version: str
    anomaly_type: str | None
    baseline_window: str | None
    reasons: tuple[Said, ...]

    def words(self, kind: Kind) -> str:
        """What it says in one respect, on one line."""
        match kind:
            case "label":
                return plain(self.label)
            case "score":
                return repr(self.anomaly_score)
            case "threshold":
                return repr(self.threshold)
            case "warm":
                return str(self.warm)
            case "first alarm":
                return str(self.first_alarm)
            case "flow id":
                return plain(self.flow_id)
            case "version":
                return plain(f"model version {self.model_version} with view version {self.view_version}")
            case "anomaly type":
                return plain(self.anomaly_type)
            case "window":
                return plain(self.baseline_window)
            case "reasons":
                return plain("; ".join(f"{one.feature} ({one.text}, share {one.share:g})" for one in self.reasons))


class Difference(Frozen):
    """A report whose verdict is another one than offline."""

    report: str
    """`file:row`."""
    flow: int
    kinds: tuple[Kind, ...]
    expected: Verdict
    got: Verdict


class Figures(Frozen):
    """What verdicts are worth on the validation flows, on one label set."""

    counts: Counts
    recall: float | None
    fpr: float | None
    families: dict[str, Share]

    @property
    def flows(self) -> int:
        """How many they are of."""
        return self.counts.tp + self.counts.fp + self.counts.tn + self.counts.fn


class Latency(Frozen):
    """Time of requests with one flow, from sending to the whole answer, milliseconds."""

    requests: int
    p50_ms: float | None
    p99_ms: float | None


class ServiceDecision(Frozen):
    """Whether a challenger's service may take over, and why."""

    passed: bool
    reason: str
    model_version: str
    detector_digest: str
    reports: int
    answered: int
    """Reports with a verdict."""
    flows: int
    requests: int
    seconds: float
    """In requests, all together."""
    latency: Latency
    differing: dict[Kind, int]
    """Flows with a differing verdict, by what differs."""
    differences: tuple[Difference, ...]
    """The first of them, one for each flow."""
    offline: dict[Labels, Figures]
    served: dict[Labels, Figures]
    """On the validation flows that were answered."""
    rules: tuple[Rule, ...]
    log: str | None
    """Last lines that the challenger wrote, if it has failed and they are known."""
    settings: ServiceGateSettings


def trial(
    deployer: Deployer,
    bundle: Path,
    digest: str,
    detector: Detector,
    reports: pd.DataFrame,
    flows: pd.DataFrame,
    validation: Ints,
    settings: ServiceGateSettings,
    *,
    model_version: str,
    on_progress: Callable[[str], None] | None = None,
) -> ServiceDecision:
    """Start a bundle beside the champion and check it; unless it passes, it is stopped, whatever happens.

    Args:
        deployer: of the champion, which is not touched.
        bundle: folder of the challenger's bundle.
        digest: of the bundle.
        detector: the challenger as it was evaluated, with its card.
        reports: as in `check`, like everything else.
        flows: flow table.
        validation: flow numbers.
        settings: bounds.
        model_version: of the challenger.
        on_progress: told in a line what is being done.

    Raises:
        DeployError: it does not become ready, or another one is on trial, or has taken its place meanwhile.
    """
    endpoint = deployer.start_challenger(bundle, model_version, digest)
    passed = False
    try:
        decision = check(
            endpoint,
            detector,
            reports,
            flows,
            validation,
            detector.card,
            settings,
            model_version=model_version,
            digest=digest,
            on_progress=on_progress,
        )
        passed = decision.passed
        return decision if passed else decision.model_copy(update={"log": deployer.challenger_log()})
    finally:
        if not passed:
            deployer.stop_challenger(digest)


def check(
    endpoint: Endpoint,
    detector: Detector,
    reports: pd.DataFrame,
    flows: pd.DataFrame,
    validation: Ints,
    card: Mapping[str, JsonValue],
    settings: ServiceGateSettings,
    *,
    model_version: str,
    digest: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> ServiceDecision:
    """Send recordings through a challenger's endpoint and hold its answers to the offline ones.

    Args:
        endpoint: of the challenger.
        detector: the challenger as it was evaluated.
        reports: canonical reports with `flow`, each recording in arrival order.
        flows: flow table of the same reports with truth; index flow number.
        validation: flow numbers of the untouched validation part.
        card: the model card; its figures of the validation part are what the service is held to.
        settings: bounds.
        model_version: that the challenger should say it is.
        digest: of its bundle; None: not asked for.
        on_progress: told in a line what is being done.
    """
    expected, got = _Verdicts.empty(len(reports)), _Verdicts.empty(len(reports))
    codes, names = pd.factorize(reports["recording"])
    places = [np.flatnonzero(codes == code) for code in range(len(names))]
    parts = [reports.iloc[rows] for rows in places]
    for rows, part in zip(places, parts, strict=True):
        expected.put_offline(rows, detector, part, model_version)
    sender = _Sender(settings, len(reports), on_progress)
    with Client(endpoint.url, endpoint.token, timeout=settings.timeout_seconds, patience=0.0) as client:
        problem: str | None = None
        said: dict[str, Any] = {}
        try:
            said = client.model()
            for rows, part in zip(places, parts, strict=True):
                sender.send(client, part, rows, got)
        except _Stopped as stopped:
            problem = str(stopped)
        except ServiceError as error:
            problem = plain(error)
    compared = _Compared.of(reports, expected, got)
    figures = [_figures(flows, validation, reports, verdicts) for verdicts in (expected, got)]
    rules = [
        _answers(problem, sender, len(reports)),
        _nothing_lost(got, sender),
        _same_model(said, detector, model_version, digest),
        *(_same(kind, compared, expected, got) for kind in KINDS),
        _not_constant(got),
        *_card_rules(card, *figures),
        _composition(flows, validation),
        _in_time(sender, settings),
    ]
    failed = [rule for rule in rules if rule.outcome == "failed"]
    return ServiceDecision(
        passed=not failed,
        reason="; ".join(f"{rule.name}: {rule.words}" for rule in failed) or "serves what was evaluated",
        model_version=model_version,
        detector_digest=detector.digest,
        reports=len(reports),
        answered=int(got.there.sum()),
        flows=len(flows),
        requests=sender.requests,
        seconds=sender.seconds,
        latency=sender.latency,
        differing={kind: compared.flows[kind] for kind in KINDS if compared.flows[kind]},
        differences=compared.first,
        offline=figures[0],
        served=figures[1],
        rules=tuple(rules),
        log=None,
        settings=settings,
    )


@dataclass(frozen=True)
class _Verdicts:
    """What is compared, [reports]."""

    there: Bools
    malicious: Bools
    score: Floats
    threshold: Floats
    warm: Bools
    first_alarm: Ints
    """ms since 1970; 0 without."""
    flow_id: np.ndarray
    version: np.ndarray
    """Of model and view."""
    kind: np.ndarray
    window: np.ndarray
    reasons: np.ndarray
    """Tuples of `Said`."""

    @classmethod
    def empty(cls, size: int) -> _Verdicts:
        return cls(
            np.zeros(size, bool),
            np.zeros(size, bool),
            np.zeros(size),
            np.zeros(size),
            np.zeros(size, bool),
            np.zeros(size, np.int64),
            *(np.full(size, None, object) for _ in range(5)),
        )

    def put_offline(self, rows: Ints, detector: Detector, part: pd.DataFrame, model_version: str) -> None:
        """What the detector says of a recording without a service."""
        judged = detector.watch().take(Columns.of(part))
        self.there[rows] = True
        self.malicious[rows] = judged.malicious
        self.score[rows] = judged.score
        self.threshold[rows] = detector.limit
        self.warm[rows] = judged.warm
        self.first_alarm[rows] = judged.first_alarm
        table, version = judged.table(), (model_version, detector.manifest.version)
        self.flow_id[rows] = part["flow_id"].astype(object).to_numpy()
        self.version[rows] = _objects(version for _ in rows)
        self.kind[rows] = table["anomaly_type"].to_numpy()
        self.window[rows] = table["baseline_window"].to_numpy()
        self.reasons[rows] = _objects(tuple(Said(**one) for one in found or ()) for found in table["reasons"])

    def put(self, rows: Ints, answered: list[_Row]) -> None:
        """What a service has answered."""
        self.there[rows] = True
        self.malicious[rows] = [row.label == MALICIOUS for row in answered]
        self.score[rows] = [row.anomaly_score for row in answered]
        self.threshold[rows] = [row.threshold for row in answered]
        self.warm[rows] = [row.warm for row in answered]
        self.first_alarm[rows] = [_milliseconds(row.first_alarm) for row in answered]
        self.flow_id[rows] = [row.flow_id for row in answered]
        self.version[rows] = _objects((row.model_version, row.view_version) for row in answered)
        self.kind[rows] = [row.anomaly_type for row in answered]
        self.window[rows] = [row.baseline_window for row in answered]
        self.reasons[rows] = _objects(row.reasons for row in answered)

    def at(self, row: int) -> Verdict:
        alarm = int(self.first_alarm[row])
        model_version, view_version = self.version[row]
        return Verdict(
            label=MALICIOUS if self.malicious[row] else BENIGN,
            anomaly_score=float(self.score[row]),
            threshold=float(self.threshold[row]),
            warm=bool(self.warm[row]),
            first_alarm=f"{np.datetime_as_string(np.datetime64(alarm, 'ms'))}Z" if alarm else None,
            flow_id=self.flow_id[row],
            model_version=model_version,
            view_version=view_version,
            anomaly_type=self.kind[row],
            baseline_window=self.window[row],
            reasons=self.reasons[row],
        )


def _objects(values: Iterable[object]) -> np.ndarray:
    """An array of them as they are: of tuples, numpy would make rows."""
    return np.fromiter(values, object)


_Text = Annotated[str, Strict(), Field(max_length=_LONGEST)]


class _Row(BaseModel):
    """A verdict as a service answers it."""

    label: Literal["benign", "malicious"]
    anomaly_score: Annotated[float, Strict(), AllowInfNan(False)]
    threshold: Annotated[float, Strict(), AllowInfNan(False)]
    warm: Annotated[bool, Strict()]
    first_alarm: datetime | None
    flow_id: _Text
    model_version: _Text
    view_version: _Text
    anomaly_type: _Text | None
    baseline_window: _Text | None
    reasons: tuple[Said, ...]


_ROWS: Final = TypeAdapter(list[_Row])


def _milliseconds(moment: datetime | None) -> int:
    return 0 if moment is None else round(moment.timestamp() * 1000)


class _Stopped(Exception):
    """The challenger has not answered as it should; nothing more is sent."""


@dataclass(frozen=True)
class _Request:
    begin: int
    end: int
    media_type: str


@dataclass
class _Sender:
    """Sends recordings, and remembers how it went."""

    settings: ServiceGateSettings
    total: int
    on_progress: Callable[[str], None] | None
    requests: int = 0
    seconds: float = 0.0
    sent: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Flows by the reason that the challenger gave."""
    singles: list[float] = field(default_factory=list)
    """Milliseconds of the requests with one flow."""
    _said: float = 0.0

    @property
    def latency(self) -> Latency:
        if not self.singles:
            return Latency(requests=0, p50_ms=None, p99_ms=None)
        p50, p99 = np.quantile(self.singles, [0.5, 0.99], method="higher")
        return Latency(requests=len(self.singles), p50_ms=float(p50), p99_ms=float(p99))

    @property
    def too_slow(self) -> bool:
        """No further request can bring the 99th percentile back within its bound."""
        slow = sum(single > self.settings.max_p99_ms for single in self.singles)
        return slow > 1 + 0.01 * self.settings.single_requests

    def send(self, client: Client, part: pd.DataFrame, rows: Ints, got: _Verdicts) -> None:
        """Send one recording as a stream of its own, which is deleted afterwards."""
        stream = f"gate-{secrets.token_hex(8)}"
        wanted = max(1, round(self.settings.single_requests * len(part) / self.total))
        tick = part["time"].dt.as_unit("ms").astype("int64").to_numpy() // _TICK_MS
        try:
            for request in self._split(_plan(tick, wanted, self.settings.largest_request)):
                self._send(client, stream, part, rows, request, got)
        finally:
            with suppress(ServiceError):
                client.delete_stream(stream)

    def _split(self, plan: Iterator[tuple[_Request, bool]]) -> Iterator[_Request]:
        """Bursts one flow at a time, unless it is known already that the challenger is too slow."""
        for request, is_burst in plan:
            begin = request.begin
            while is_burst and begin < request.end and not self.too_slow:
                yield _Request(begin, begin + 1, request.media_type)
                begin += 1
            if begin < request.end:
                yield _Request(begin, request.end, request.media_type)

    def _send(
        self, client: Client, stream: str, part: pd.DataFrame, rows: Ints, request: _Request, got: _Verdicts
    ) -> None:
        reports = part.iloc[request.begin : request.end]
        body = encode(reports, request.media_type)
        begin = time.perf_counter()
        try:
            reply = client.post_verdicts(body, media_type=request.media_type, stream=stream, seen=request.begin)
        except ServiceError as error:
            raise _Stopped(f"{_place(part, request.begin)}: {plain(error)}") from error
        seconds = time.perf_counter() - begin
        self.requests += 1
        self.seconds += seconds
        self.sent += len(reports)
        if len(reports) == 1:
            self.singles.append(1000 * seconds)
        try:
            if reply.seen != request.end:
                raise ServiceError(f"the service counts {reply.seen} flows, not {request.end}")
            answered = Answers(request.begin, len(reports), reply).rows()
            good = [at for at, row in enumerate(answered) if "rejected" not in row]
            for row in answered:
                if "rejected" in row:
                    reason = str(row["rejected"])[:200]
                    self.rejected[reason] = self.rejected.get(reason, 0) + 1
            verdicts = _ROWS.validate_python([answered[at] for at in good])
        except (ServiceError, ValidationError, AttributeError, TypeError) as error:
            what = plain(str(error).splitlines()[0])
            raise _Stopped(f"{_place(part, request.begin)}: the answer cannot be read: {what}") from error
        got.put(rows[request.begin : request.end][good], verdicts)
        self._tell()

    def _tell(self) -> None:
        if self.on_progress and time.monotonic() - self._said > _SAID:
            self._said = time.monotonic()
            self.on_progress(f"service gate: {self.sent:,} of {self.total:,} reports")


def _plan(tick: Ints, wanted: int, largest: int) -> Iterator[tuple[_Request, bool]]:
    """How a recording is cut into requests; True: a burst, to be sent flow by flow.

    Bursts are spread evenly; between them come the rest of a tick and then as much as one request may hold, turn by
    turn as JSON and Arrow.
    """
    size = len(tick)
    wanted = min(wanted, max(1, size // 4))
    bursts = math.ceil(wanted / BURST)
    length = math.ceil(wanted / bursts)
    starts = np.linspace(0, size - length, bursts).round().astype(int).tolist() if bursts > 1 else [size // 2]
    position = 0
    for turn, start in enumerate([*starts, size]):
        small, large = (JSON, ARROW) if turn % 2 else (ARROW, JSON)
        if position < start:
            end = min(int(np.searchsorted(tick, tick[position], side="right")), start)
            end = max(end, position + 1)
            yield _Request(position, end, small), False
            position = end
        while position < start:
            end = min(position + largest, start)
            yield _Request(position, end, large), False
            position = end
        if start < size:
            position = start + length
            yield _Request(start, position, JSON), True


def _place(reports: pd.DataFrame, row: int) -> str:
    return f"{plain(reports['file'].iloc[row])}:{reports['row'].iloc[row]}"


@dataclass(frozen=True)
class _Compared:
    differs: dict[Kind, Bools]
    """[reports], False where there is no verdict."""
    flows: dict[Kind, int]
    """Flows with a difference of the kind."""
    first: tuple[Difference, ...]
    places: dict[Kind, str]
    """`file:row` of the first difference of each kind."""

    @classmethod
    def of(cls, reports: pd.DataFrame, expected: _Verdicts, got: _Verdicts) -> _Compared:
        flow = reports["flow"].to_numpy(np.int64)
        differs: dict[Kind, Bools] = {
            "label": expected.malicious != got.malicious,
            "score": expected.score.view(np.int64) != got.score.view(np.int64),
            "threshold": expected.threshold.view(np.int64) != got.threshold.view(np.int64),
            "warm": expected.warm != got.warm,
            "first alarm": expected.first_alarm != got.first_alarm,
            "flow id": expected.flow_id != got.flow_id,
            "version": expected.version != got.version,
            "anomaly type": expected.kind != got.kind,
            "window": expected.window != got.window,
            "reasons": expected.reasons != got.reasons,
        }
        differs = {kind: rows & got.there for kind, rows in differs.items()}
        anything = np.flatnonzero(np.any(list(differs.values()), axis=0))
        _, once = np.unique(flow[anything], return_index=True)
        first = [
            Difference(
                report=_place(reports, row),
                flow=int(flow[row]),
                kinds=tuple(kind for kind in KINDS if differs[kind][row]),
                expected=expected.at(row),
                got=got.at(row),
            )
            for row in anything[np.sort(once)][:LISTED].tolist()
        ]
        return cls(
            differs,
            {kind: len(np.unique(flow[rows])) for kind, rows in differs.items()},
            tuple(first),
            {kind: _place(reports, int(rows.argmax())) for kind, rows in differs.items() if rows.any()},
        )


def _figures(
    flows: pd.DataFrame, validation: Ints, reports: pd.DataFrame, verdicts: _Verdicts
) -> dict[Labels, Figures]:
    """Figures of the flows' last verdicts on the validation flows that have one."""
    flow = reports["flow"].to_numpy(np.int64)
    last = np.full(int(flow.max(initial=-1)) + 1, -1, np.int64)
    last[flow] = np.arange(len(flow))
    of_flow = last[validation]
    there = (of_flow >= 0) & verdicts.there[of_flow]
    flagged, judged = verdicts.malicious[of_flow[there]], flows.loc[validation[there]]
    result: dict[Labels, Figures] = {}
    for labels in LABELS:
        if LABEL_COLUMNS[labels] not in flows:
            continue
        known, malicious, family = truth(judged, labels)
        counts = count(malicious[known], flagged[known])
        result[labels] = Figures(
            counts=counts,
            recall=share(counts.tp + counts.fn, counts.tp).rate,
            fpr=share(counts.fp + counts.tn, counts.fp).rate,
            families={
                str(name): share(int((family == name).sum()), int(flagged[family == name].sum()))
                for name in sorted(pd.unique(family[malicious]))
            },
        )
    return result


def _rule(name: str, problem: str | None, words: str, figures: Mapping[str, float | None] | None = None) -> Rule:
    outcome: Outcome = "failed" if problem else "passed"
    return Rule(name=name, outcome=outcome, words=problem or words, figures=dict(figures or {}))


def _undecided(name: str, words: str) -> Rule:
    return Rule(name=name, outcome="not decided", words=words, figures={})


def _answers(problem: str | None, sender: _Sender, total: int) -> Rule:
    words = f"{sender.requests:,} requests with {total:,} reports answered"
    stopped = f"{problem} (after {sender.sent:,} of {total:,} reports)" if problem else None
    return _rule("answers", stopped, words, {"reports": total, "sent": sender.sent, "requests": sender.requests})


def _nothing_lost(got: _Verdicts, sender: _Sender) -> Rule:
    lost, rejected = int((~got.there).sum()), sum(sender.rejected.values())
    problem = None
    if lost:
        problem = f"{lost:,} of {len(got.there):,} reports have no verdict"
        if rejected:
            worst = max(sender.rejected, key=lambda reason: sender.rejected[reason])
            problem += f", {rejected:,} were rejected, most often because {plain(worst)}"
    return _rule("nothing lost", problem, "every report has a verdict", {"lost": lost, "rejected": rejected})


def _same_model(said: Mapping[str, Any], detector: Detector, model_version: str, digest: str | None) -> Rule:
    if not said:
        return _undecided("same model", "the challenger does not say what it is")
    manifest = said.get("manifest")
    wanted: dict[str, tuple[object, object]] = {
        "model version": (said.get("model_version"), model_version),
        "digest of the detector": (said.get("detector_digest"), detector.digest),
        "view": (said.get("view"), detector.manifest.name),
        "view version": (said.get("view_version"), detector.manifest.version),
        "digest of the view": (
            manifest.get("digest") if isinstance(manifest, dict) else None,
            detector.manifest.digest,
        ),
        "threshold": (said.get("threshold"), detector.limit),
    }
    if digest is not None:
        wanted["digest of the bundle"] = said.get("digest"), digest
    wrong = [
        f"{name} {plain(got)[:64] if got is not None else 'missing'} instead of {plain(want)[:64]}"
        for name, (got, want) in wanted.items()
        if got != want
    ]
    return _rule("same model", ", ".join(wrong) or None, f"model version {model_version}, detector {detector.digest}")


_PLURAL: Final[Mapping[Kind, str]] = {
    "label": "labels",
    "score": "scores",
    "threshold": "thresholds",
    "warm": "warm-up",
    "first alarm": "first alarms",
    "flow id": "flow ids",
    "version": "versions",
    "anomaly type": "anomaly types",
    "window": "baseline windows",
    "reasons": "reasons",
}


def _same(kind: Kind, compared: _Compared, expected: _Verdicts, got: _Verdicts) -> Rule:
    rows, there = compared.differs[kind], int(got.there.sum())
    number, problem = int(rows.sum()), None
    if not there:
        return _undecided(f"same {_PLURAL[kind]}", "there is no verdict to compare")
    if number:
        row = int(rows.argmax())
        want, have = (_shortened(verdicts.at(row).words(kind)) for verdicts in (expected, got))
        whole = "every verdict differs" if number == there else f"{number:,} of {there:,} verdicts differ"
        problem = f"{whole}, of {compared.flows[kind]:,} flows; first {compared.places[kind]}: {have} not {want}"
    return _rule(
        f"same {_PLURAL[kind]}",
        problem,
        f"{there:,} verdicts as offline",
        {"verdicts": there, "differing": number, "flows": compared.flows[kind]},
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _not_constant(got: _Verdicts) -> Rule:
    scores = len(np.unique(got.score[got.there]))
    labels = sorted({MALICIOUS if flag else BENIGN for flag in got.malicious[got.there]})
    problem = None
    if scores < 2 or len(labels) < 2:
        if not got.there.all():
            return _undecided("no constant", "too few verdicts were answered to say")
        problem = f"{scores:,} different score{'s' if scores != 1 else ''} and only the label {', '.join(labels)}"
    return _rule(
        "no constant",
        problem,
        f"{scores:,} different scores and both labels",
        {"scores": scores, "labels": len(labels)},
    )


def _card_rules(
    card: Mapping[str, JsonValue], offline: Mapping[Labels, Figures], served: Mapping[Labels, Figures]
) -> list[Rule]:
    """Recall of each family and FPR served, against the card's; one rule for each label set."""
    validation = card.get("validation")
    rules = []
    for labels in LABELS:
        said = validation.get(labels) if isinstance(validation, dict) else None
        if said is None and labels == "published":
            continue
        name = f"figures of the card, {labels} labels"
        if labels in served and served[labels].flows < offline[labels].flows:
            lost = offline[labels].flows - served[labels].flows
            rules.append(_undecided(name, f"{lost:,} validation flows have no verdict"))
            continue
        problem, figures = _beside_card(said, served.get(labels))
        rules.append(_rule(name, problem, "recall of every family and FPR as on the model card", figures))
    return rules


def _beside_card(said: JsonValue, served: Figures | None) -> tuple[str | None, dict[str, float | None]]:
    if served is None or not isinstance(said, dict):
        return "the model card has no figures of the validation part", {}
    try:
        counts = Counts.model_validate(said["counts"])
        families = TypeAdapter(dict[str, Share]).validate_python(said["families"])
    except (KeyError, ValidationError):
        return "the model card's figures of the validation part cannot be read", {}
    benign = share(counts.fp + counts.tn, counts.fp)
    pairs = {"FPR": (share(served.counts.fp + served.counts.tn, served.counts.fp), benign)}
    nothing = share(0, 0)
    for name in sorted({*families, *served.families}):
        pairs[f"recall of {name}"] = served.families.get(name, nothing), families.get(name, nothing)
    wrong = [f"{name} {_share(got)} instead of {_share(want)}" for name, (got, want) in pairs.items() if got != want]
    return ", ".join(wrong) or None, {name: got.rate for name, (got, _) in pairs.items()}


def _share(value: Share) -> str:
    rate = "undefined" if value.rate is None else f"{value.rate:.4f}"
    return f"{rate} ({value.flagged:,} of {value.flows:,})"


def _composition(flows: pd.DataFrame, validation: Ints) -> Rule:
    """Whether the validation flows hold both classes; families that they lack are said."""
    labels: Labels = "corrected" if "corrected" in flows else "published"
    _, attack, everywhere = truth(flows, labels)
    known, malicious, family = truth(flows.loc[validation], labels)
    classes = {"benign": int((known & ~malicious).sum()), "malicious": int(malicious.sum())}
    missing = [name for name, number in classes.items() if not number]
    absent = sorted({str(name) for name in everywhere[attack]} - {str(name) for name in family[malicious]})
    words = f"{classes['benign']:,} benign and {classes['malicious']:,} malicious validation flows"
    if absent:
        words += f"; too few flows for these families to be among them: {plain(', '.join(absent))}"
    problem = f"{words}: without {' and '.join(missing)} flows nothing can be said" if missing else None
    return _rule("both classes", problem, words, dict(classes))


def _in_time(sender: _Sender, settings: ServiceGateSettings) -> Rule:
    latency = sender.latency
    if latency.p50_ms is None or latency.p99_ms is None:
        return _undecided("latency", "no request with one flow was answered")
    words = f"{latency.requests:,} requests with one flow: p50 {latency.p50_ms:.1f} ms, p99 {latency.p99_ms:.1f} ms"
    words += f", at most {settings.max_p99_ms:g} ms allowed"
    problem = words if latency.p99_ms > settings.max_p99_ms else None
    return _rule("latency", problem, words, {"p50_ms": latency.p50_ms, "p99_ms": latency.p99_ms})
