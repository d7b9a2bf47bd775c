from __future__ import annotations

from pathlib import Path

import pytest
from zenml.client import Client
from zenml.types import HTMLString

from flowsentry.config import ServiceGateSettings
from flowsentry.errors import DeployError
from flowsentry.serving.service_gate import Latency, ServiceDecision
from stacks import apply
from steps.deploy import _kept

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


def test_a_switch_that_fails_after_a_passed_gate_leaves_decision_and_page(
    isolated_zenml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    apply.activate("local")
    decision = ServiceDecision(
        passed=True,
        reason="serves what was evaluated",
        model_version="7",
        detector_digest="ab" * 32,
        reports=100,
        answered=100,
        flows=50,
        requests=12,
        seconds=0.5,
        latency=Latency(requests=10, p50_ms=2.0, p99_ms=31.5),
        differing={},
        differences=(),
        offline={},
        served={},
        rules=(),
        log=None,
        settings=ServiceGateSettings(),
    )
    with pytest.raises(DeployError, match="has died"), _kept(decision, HTMLString("<p>passed</p>")):
        raise DeployError("the challenger has died")
    assert Client().get_artifact_version("service_decision").load() == decision
    assert Client().get_artifact_version("gates_page").load() == "<p>passed</p>"
