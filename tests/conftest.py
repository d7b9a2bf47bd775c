"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _real_data_file(name: str) -> Path:
    folder = Path(os.environ.get("FLOWSENTRY_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"real flows are not here: {name} is missing in FLOWSENTRY_REAL_DATA (default ../shared/data)")
    return path


@pytest.fixture(scope="session")
def real_flows() -> Path:
    """The February 2022 recording of the AssureMOSS dataset, one record per flow."""
    return _real_data_file("elastic_february2022_flows.csv.gz")


@pytest.fixture(scope="session")
def may_sample() -> Path:
    """100 unmodified records of May 2021 of the AssureMOSS dataset."""
    return _real_data_file("elastic_may2021_sample.csv")
