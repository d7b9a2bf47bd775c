from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowsentry.detector import Detector
from flowsentry.serving.client import Client
from flowsentry.serving.deployer import Endpoint
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

ROOT = Path(__file__).resolve().parents[3]


class Service:
    """A service process that can be killed and started again at the same address."""

    def __init__(self, detector: Path, state: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.endpoint = Endpoint(url=f"http://127.0.0.1:{self.port}", token=None)
        self._arguments = [str(detector), str(state), str(self.port)]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        program = "tests.flowsentry.monitoring.service_process"
        self.process = subprocess.Popen([sys.executable, "-m", program, *self._arguments], cwd=ROOT)
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        limit = time.monotonic() + 30
        with Client(self.endpoint.url) as client:
            while not client.ready():
                assert time.monotonic() < limit
                time.sleep(0.05)


@pytest.fixture(scope="session")
def detector(small: Small) -> Detector:
    return trained(small)


@pytest.fixture(scope="session")
def detector_folder(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    detector.save(folder)
    return folder


@pytest.fixture(scope="session")
def shared_service(detector_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """For tests that use streams of their own."""
    service = Service(detector_folder, tmp_path_factory.mktemp("state"))
    service.wait()
    yield service
    service.kill()


@pytest.fixture
def new_service(detector_folder: Path, tmp_path: Path) -> Iterator[Callable[[], Service]]:
    """Services that the test may kill."""
    services = []

    def start() -> Service:
        services.append(Service(detector_folder, tmp_path / "state"))
        services[-1].wait()
        return services[-1]

    yield start
    for service in services:
        service.kill()
