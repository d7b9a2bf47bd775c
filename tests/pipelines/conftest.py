from __future__ import annotations

import pytest

from flowsentry.detector import Detector
from tests.pipelines.champion import trained


@pytest.fixture(scope="session")
def detector() -> Detector:
    """A decision tree of a simulated hour."""
    return trained()
