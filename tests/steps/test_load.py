from __future__ import annotations

from pathlib import Path

import pytest

from flowsentry.errors import SourceError
from flowsentry.flows import sources
from flowsentry.simulation import SimulationSettings, simulate
from flowsentry.simulation.files import write
from steps.load import load


def test_a_file_that_changes_while_the_run_begins_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.csv.gz"
    reports = simulate(SimulationSettings(minutes=40, scale=0.02, episodes=1))
    write(reports, path)
    digests = sources.digests([str(path)])
    write(reports.head(100), path)
    with pytest.raises(SourceError, match="changed while the run began; run it again"):
        load.entrypoint([str(path)], digests, SimulationSettings())
