"""`python -m flowsentry start | status | stop`, with a stand-in service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowsentry.__main__ import main
from flowsentry.serving.deployer import HOME
from flowsentry.serving.local import PORT, LocalDeployer
from tests.flowsentry.serving.test_local import STAND_IN, deploy, processes


def test_a_champion_is_shown_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.setenv(PORT, "0")
    deployer = LocalDeployer(worker=str(STAND_IN))
    assert main(["start"]) == 1
    assert "run.py --pipeline train" in capsys.readouterr().err
    try:
        for version in ("1", "2"):
            deploy(deployer, tmp_path, version)
        assert main(["status"]) == 0
        told = capsys.readouterr().out
        assert "champion    model version 2" in told and "healthy" in told and deployer.endpoint().url in told
        assert "previous    model version 1" in told and "challenger  none" in told
        deployer.rollback()
        assert main(["status"]) == 0
        assert "champion    model version 1" in capsys.readouterr().out
        assert main(["start"]) == 0
        assert main(["status", "--json"]) == 0
        told = capsys.readouterr().out
        status = json.loads(told[told.index("{") :])
        assert (status["record"]["champion"]["model_version"], status["champion"]["healthy"]) == ("1", True)
        assert str(deployer.endpoint().token) not in told
        assert main(["stop"]) == 0
        assert not processes(tmp_path / "home")
        record = deployer.record()
        assert record.champion is not None
        altered = tmp_path / "home" / "bundles" / record.champion.digest / "src" / "bundle.json"
        altered.write_text("{}")
        assert main(["status"]) == 0
        assert not deployer.status().running
        assert "nothing runs" in capsys.readouterr().out
    finally:
        deployer.stop()
