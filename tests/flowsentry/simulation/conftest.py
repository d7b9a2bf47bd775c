from __future__ import annotations

import pandas as pd
import pytest

from flowsentry.flows.reports import identify
from flowsentry.simulation import SimulationSettings, simulate


@pytest.fixture(scope="session")
def default_reports() -> pd.DataFrame:
    """The embedded default recording, with the number of every report's flow."""
    reports = simulate(SimulationSettings())
    return reports.assign(number=identify(reports))


@pytest.fixture(scope="session")
def default_flows(default_reports: pd.DataFrame) -> pd.DataFrame:
    """The last report of every flow."""
    return default_reports.groupby("number").tail(1).sort_values("number")
