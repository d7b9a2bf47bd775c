"""Whole runs of the pipeline train up to production, with a real service, in a ZenML and a home of their own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from zenml import log_metadata
from zenml.client import Client
from zenml.enums import ExecutionStatus

import run as program
from flowsentry.learning.quality_gate import QualityDecision
from flowsentry.serving.client import Client as ServiceClient
from flowsentry.serving.local import LocalDeployer
from flowsentry.serving.service_gate import ServiceDecision
from tests.pipelines.champion import Ran, no_model, start

CONFIG = """\
simulation: {minutes: 60, scale: 0.1, episodes: 1}
families: [effects]
splits: {rotations: 1}
search: {folds: 2}
quality_gate: {min_metric: 0.1, max_fpr: 0.2, max_loss: 0.2, max_family_loss: 1.0}
service_gate: {max_p99_ms: 5000.0, single_requests: 50}
"""
STEPS = {"quality_gate", "build", "deploy"}

pytestmark = [
    pytest.mark.slow,
    # ZenML and MLflow warn of themselves and of one another; what our own code does wrong still counts
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


def run(*arguments: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program.main(arguments)
    return Said(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def production(isolated_zenml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployer]:
    """Nothing is deployed at first."""
    folder = tmp_path_factory.mktemp("production")
    with pytest.MonkeyPatch.context() as patch, no_model():
        patch.chdir(folder)
        patch.setenv("FLOWSENTRY_HOME", str(folder / "home"))
        patch.setenv("FLOWSENTRY_PORT", "0")
        deployer = LocalDeployer()
        try:
            yield deployer
        finally:
            deployer.stop()


@pytest.fixture(scope="module")
def first(production: LocalDeployer) -> Ran:
    Path("config.yaml").write_text(CONFIG)
    return start("train")


def serving(deployer: LocalDeployer) -> str:
    """The model version that answers at the champion's address."""
    endpoint = deployer.endpoint()
    with ServiceClient(endpoint.url, endpoint.token) as client:
        return str(client.model()["model_version"])


def test_train_ends_with_a_champion_that_answers(first: Ran, production: LocalDeployer) -> None:
    assert first.status == 0, first.err
    assert {first.states[step] for step in STEPS} == {ExecutionStatus.COMPLETED}
    address = first.load("deploy", "address")
    assert f"Champion: version 1 at {address}" in first.out
    assert "Model:    flowsentry, version 1, stage production" in first.out
    assert "gates.html" in first.files
    assert serving(production) == "1"


def test_both_decisions_are_stored_with_what_they_rest_on(first: Ran) -> None:
    quality: QualityDecision = first.load("quality_gate", "quality_decision")
    service: ServiceDecision = first.load("deploy", "service_decision")
    assert quality.passed
    assert quality.basis == "absolute bars"
    assert quality.malicious > 0
    assert service.passed
    assert {rule.outcome for rule in service.rules} <= {"passed", "not decided"}


def test_the_digest_of_what_is_served_is_noted_with_the_model_version(first: Ran, production: LocalDeployer) -> None:
    record = production.record()
    assert record.champion is not None
    version = Client().get_model_version("flowsentry", "1")
    assert version.run_metadata["bundle_digest"] == record.champion.digest == first.load("build", "bundle").digest


def test_the_same_again_changes_nothing_in_production(first: Ran, production: LocalDeployer) -> None:
    before = production.record()
    again = start("train")
    assert again.status == 0, again.err
    assert production.record() == before
    assert again.states["build"] == ExecutionStatus.CACHED
    assert again.states["deploy"] == ExecutionStatus.COMPLETED
    assert "is the champion already" in again.out


def test_a_champion_of_another_store_is_not_taken_for_the_version_with_its_number(
    first: Ran, production: LocalDeployer
) -> None:
    """Every store counts from 1: this one notes that its version 1 became another bundle."""
    before = production.record()
    assert before.champion is not None
    version = Client().get_model_version("flowsentry", "1").id
    log_metadata(metadata={"bundle_digest": "f" * 64}, model_version_id=version)
    try:
        refused = start("train")
    finally:
        log_metadata(metadata={"bundle_digest": before.champion.digest}, model_version_id=version)
    assert refused.status == 1
    assert "the champion 1 cannot be compared: this ZenML store does not know its bundle" in refused.err
    assert "quality_gate.without_champion: true" in refused.err
    decision: QualityDecision = refused.load("quality_gate", "quality_decision")
    assert [rule.name for rule in decision.rules if rule.outcome == "failed"] == ["champion"]
    assert decision.champion_digest == before.champion.digest
    assert production.record() == before


def test_a_challenger_that_is_worse_than_the_champion_does_not_reach_production(
    first: Ran, production: LocalDeployer
) -> None:
    before = production.record()
    worse = CONFIG.replace("[effects]", "[decision_tree]") + "select: {protocol: random, metric: accuracy}\n"
    Path("config.yaml").write_text(worse)
    refused = start("train")
    assert refused.status == 1
    assert refused.err.startswith("error: model version 2 is not good enough")
    assert refused.states["quality_gate"] == ExecutionStatus.FAILED
    assert "deploy" not in refused.states
    assert not refused.load("quality_gate", "quality_decision").passed
    assert "gates.html" in refused.files
    assert production.record() == before
    assert serving(production) == "1"


def test_a_challenger_that_is_too_slow_is_stopped_and_the_champion_stays(first: Ran, production: LocalDeployer) -> None:
    before = production.record()
    Path("config.yaml").write_text(CONFIG.replace("max_p99_ms: 5000.0", "max_p99_ms: 1.0e-3").replace("60,", "62,"))
    refused = start("train")
    assert refused.status == 1
    assert "is not what was tested" in refused.err
    assert refused.states["deploy"] == ExecutionStatus.FAILED
    decision: ServiceDecision = refused.load("deploy", "service_decision")
    assert [rule.name for rule in decision.rules if rule.outcome == "failed"] == ["latency"]
    assert refused.load("quality_gate", "quality_decision").basis == "champion"
    assert production.record() == before
    assert serving(production) == "1"


def test_a_rollback_and_the_way_back_keep_zenml_equal(first: Ran, production: LocalDeployer) -> None:
    Path("config.yaml").write_text(CONFIG.replace("60,", "63,"))
    second = start("train")
    assert second.status == 0, second.err
    newest = serving(production)
    assert newest != "1"
    rolled = run("--rollback")
    assert (rolled.status, rolled.err) == (0, "")
    assert "champion    model version 1, bundle" in rolled.out
    assert "ZenML       version 1 at stage production" in rolled.out
    assert serving(production) == "1"
    Client().get_model_version("flowsentry", newest).set_stage("production", force=True)
    status = run("--status")
    assert status.status == 1
    assert status.err == (
        f"error: version 1 is in production, but ZenML has version {newest} at stage production: "
        "python run.py --pipeline train again, or --rollback, makes them equal\n"
    )


def test_the_status_starts_nothing_and_an_altered_bundle_does_not_keep_it_from_answering(
    first: Ran, production: LocalDeployer
) -> None:
    production.stop()
    record = production.record()
    assert record.champion is not None
    (production.home / "bundles" / record.champion.digest / "src" / "bundle.json").write_text("{}")
    said = run("--status").out
    assert f"bundle {record.champion.digest[:12]}" in said
    assert "nothing runs" in said
    assert not production.status().running
