"""Challengers that must not become champion: real bundles, altered and sealed again, in real processes.

Each was evaluated as a good one; what its bundle does is something else, as after a bug or an attack.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowsentry.config import ServiceGateSettings
from flowsentry.errors import DeployError
from flowsentry.features.behaviour import VERSION
from flowsentry.serving import bundle as bundles
from flowsentry.serving.client import Client, StreamClient
from flowsentry.serving.local import LocalDeployer
from flowsentry.serving.service_gate import ServiceDecision, trial
from tests.flowsentry.serving.test_service_gate import Case, make_case

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

pytestmark = pytest.mark.slow

Alter = Callable[[Path], None]
SETTINGS = ServiceGateSettings(single_requests=20, max_p99_ms=600)


@dataclass
class Bench:
    """A champion at work, and the bundle that challengers are made from."""

    case: Case
    deployer: LocalDeployer
    bundle: Path
    folder: Path
    champion: StreamClient
    taken: int = 0
    pids: list[int] = field(default_factory=list)
    """Of the challengers, as they were asked."""

    def challenge(self, version: str, alter: Alter | None) -> ServiceDecision:
        """Try an altered copy of the bundle."""
        copy = self.folder / version
        shutil.copytree(self.bundle, copy)
        source = copy / "src"
        if alter is not None:
            alter(source)
        digest = seal(copy, version)
        return trial(
            self.deployer,
            copy,
            digest,
            self.case.detector,
            self.case.reports,
            self.case.flows,
            self.case.validation,
            SETTINGS,
            model_version=version,
            on_progress=lambda _: self.note_pid(),
        )

    def note_pid(self) -> None:
        challenger = self.deployer.status().challenger
        assert challenger is not None
        self.pids += [challenger.pid] if challenger.pid else []

    def assert_untouched(self) -> None:
        """The champion is who it was and goes on where it was, as if nobody had challenged it."""
        status = self.deployer.status()
        assert status.record.champion is not None
        assert (status.record.champion.model_version, status.record.previous, status.record.challenger) == (
            "1", None, None,
        )  # fmt: skip
        assert status.champion is not None
        assert (status.champion.state, status.champion.restarts, status.challenger) == ("ready", 0, None)
        flows = self.case.reports.iloc[self.taken : self.taken + 100]
        answers = self.champion.send(flows).rows()
        offline = self.case.detector.verdicts(self.case.reports.head(self.taken + 100)).iloc[self.taken :]
        assert [row["anomaly_score"] for row in answers] == offline["anomaly_score"].tolist()
        assert {row["model_version"] for row in answers} == {"1"}
        self.taken += 100


def seal(folder: Path, version: str) -> str:
    """Write model version, digest of the detector and sums anew; gives the digest of the bundle."""
    about = json.loads((folder / "src" / "bundle.json").read_text())
    about["model_version"] = version
    about["view_version"] = json.loads((folder / "src" / "detector" / "view.json").read_text())["version"]
    about["detector_digest"] = _digest(folder / "src" / "detector")
    (folder / "src" / "bundle.json").write_text(json.dumps(about))
    text = bundles._sums(folder)
    (folder / bundles.SUMS).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(folder: Path) -> str:
    """As `Detector.digest`, also of what this code would not load."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "card.json"):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        hashed.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return hashed.hexdigest()


@pytest.fixture(scope="module")
def bench(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    case = make_case(small, "behaviour", "gradient_boosting")
    bundle = bundles.build(case.detector, "1", folder / "champion")
    deployer = LocalDeployer(folder / "home", port=0)
    try:
        deployer.start_challenger(bundle.path, "1", bundle.digest)
        deployer.promote(bundle.digest, None)
        endpoint = deployer.endpoint()
        with Client(endpoint.url, endpoint.token, patience=5) as client:
            yield Bench(case, deployer, bundle.path, folder, StreamClient(client, "production"))
    finally:
        deployer.stop()


def changed(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), separators=(",", ":")))


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} no longer holds {old!r} once"
    path.write_text(text.replace(old, new))


def other_transform(source: Path) -> None:
    """Another training run's file beside this one's model."""
    changed(source / "detector" / "transform.json", lambda given: given | {"high": [2 * v + 1 for v in given["high"]]})


def other_threshold(source: Path) -> None:
    changed(source / "detector" / "limit.json", lambda given: given | {"target_fpr": 0.05})


def swapped_labels(source: Path) -> None:
    schema = source / "flowsentry" / "flows" / "schema.py"
    replaced(schema, 'BENIGN: Final = "benign"', 'BENIGN: Final = "malicious"')
    replaced(schema, 'MALICIOUS: Final = "malicious"', 'MALICIOUS: Final = "benign"')


def stale_view(source: Path) -> None:
    """The view of an earlier release, which says so: every TCP flow counts as one that carried something."""
    columns = source / "flowsentry" / "flows" / "columns.py"
    replaced(columns, "NO_PAYLOAD_BYTES: Final = 400", "NO_PAYLOAD_BYTES: Final = 4")
    replaced(columns, "HEADER_BYTES: Final = 80", "HEADER_BYTES: Final = 8")
    replaced(source / "flowsentry" / "features" / "behaviour.py", "Final = kernel.KERNEL_VERSION", 'Final = "0"')
    replaced(source / "detector" / "view.json", f'"version": "{VERSION}"', '"version": "0"')


def constant_model(source: Path) -> None:
    changed(source / "detector" / "tail.json", lambda _: {"scores": [1e9], "surprises": [0.0], "excess": 1.0})


def reasons_of_others(source: Path) -> None:
    """Right scores, explained by other flows of the same request."""
    replaced(source / "flowsentry" / "detector.py", "tell(self.detector, rows)", "tell(self.detector, rows[::-1])")


TAKE = "        detector, limit = self.detector, self.detector.limit\n"


def slow_model(source: Path) -> None:
    """Slow only once it is at work, not when the service rehearses."""
    sleep = "        if self.stream.seen >= 10:\n            __import__('time').sleep(0.9)\n"
    replaced(source / "flowsentry" / "detector.py", TAKE, sleep + TAKE)


def crash_on_the_1000th_flow(source: Path) -> None:
    crash = "        if self.stream.seen + len(reports) >= 1000:\n            __import__('os')._exit(9)\n"
    replaced(source / "flowsentry" / "detector.py", TAKE, crash + TAKE)


@pytest.mark.parametrize(
    ("alter", "reasons", "words"),
    [
        (other_transform, {"same scores", "figures of the card, corrected labels"}, "digest of the detector"),
        (other_threshold, {"same model", "same thresholds"}, "threshold 1.30"),
        (swapped_labels, {"same labels", "figures of the card, corrected labels"}, "every verdict differs"),
        (stale_view, {"same model", "same scores"}, f"view version 0 instead of {VERSION}"),
        (constant_model, {"no constant", "same scores"}, "1 different score and only the label benign"),
        (reasons_of_others, {"same reasons"}, " not "),
        (slow_model, {"latency"}, "at most 600 ms allowed"),
        (crash_on_the_1000th_flow, {"answers", "nothing lost"}, "does not answer"),
    ],
)
def test_a_broken_challenger_is_refused_for_the_right_reason_and_the_champion_goes_on(
    bench: Bench, alter: Alter, reasons: set[str], words: str
) -> None:
    decision = bench.challenge(alter.__name__, alter)
    failed = {one.name for one in decision.rules if one.outcome == "failed"}
    assert not decision.passed
    assert failed >= reasons
    assert words in decision.reason
    assert decision.log is not None
    assert '"event":"ready"' in decision.log
    with pytest.raises(ProcessLookupError):
        os.kill(bench.pids[-1], 0)
    bench.assert_untouched()


def test_the_same_bundle_unbroken_passes_and_waits_beside_the_champion(bench: Bench) -> None:
    decision = bench.challenge("2", None)
    assert decision.passed, decision.reason
    challenger = bench.deployer.record().challenger
    assert challenger is not None
    assert challenger.model_version == "2"
    bench.deployer.stop_challenger()
    bench.assert_untouched()


def test_a_challenger_that_does_not_start_is_an_error_with_its_last_lines(bench: Bench) -> None:
    def forget_the_model(source: Path) -> None:
        shutil.rmtree(source / "detector" / "model")

    with pytest.raises(DeployError, match="not a stored model"):
        bench.challenge("headless", forget_the_model)
    bench.assert_untouched()
