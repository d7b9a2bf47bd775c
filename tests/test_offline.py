from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowsentry.serving.local import LocalDeployer
from tests.network import run_offline

ROOT = Path(__file__).parents[1]
SMALL = """\
simulation: {minutes: 60, scale: 0.1, episodes: 1}
families: [effects, tails]
splits: {rotations: 1}
search: {folds: 2}
quality_gate: {min_metric: 0.0, max_fpr: 1.0}
service_gate: {max_p99_ms: 5000.0, single_requests: 50}
"""


@pytest.mark.slow
def test_a_whole_run_needs_no_network_and_tries_to_reach_nobody(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    # nothing else from the environment: some libraries are silent in CI of their own accord
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "ZENML_CONFIG_PATH": str(tmp_path / "zenml"),
        "FLOWSENTRY_PORT": "0",
    }
    scratch = tmp_path / "guard"
    scratch.mkdir()
    try:
        done, reached = run_offline(
            [str(ROOT / "run.py"), "--pipeline", "train", "--config", str(config)],
            scratch=scratch,
            cwd=tmp_path,
            environment=environment,
            timeout=600,
        )
    finally:
        LocalDeployer(tmp_path / ".flowsentry").stop()
    assert reached == []
    for step in ("validate", "evaluate", "build", "deploy"):
        assert f"Step `{step}` has finished" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
