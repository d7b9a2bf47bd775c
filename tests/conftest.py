"""Shared fixtures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowsentry import telemetry

telemetry.disable()

REPOSITORY = Path(__file__).resolve().parent.parent


def _real_data_file(name: str) -> Path:
    folder = Path(os.environ.get("FLOWSENTRY_REAL_DATA", REPOSITORY / "data"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"real flows are not here: {name} is missing in FLOWSENTRY_REAL_DATA (default data/)")
    return path


@pytest.fixture(scope="session")
def real_flows() -> Path:
    """The February 2022 recording of the AssureMOSS dataset, one record per flow."""
    return _real_data_file("elastic_february2022_flows.csv.gz")


@pytest.fixture(scope="session")
def may_sample() -> Path:
    """100 unmodified records of May 2021 of the AssureMOSS dataset."""
    return _real_data_file("elastic_may2021_sample.csv")


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes to test on."""

    registry: str
    """That its nodes pull from and this machine pushes to."""
    host: str
    """Address of this machine that works in pods too."""


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The Kubernetes of KUBECONFIG."""
    missing = [name for name in ("KUBECONFIG", "TEST_REGISTRY", "TEST_HOST") if not os.environ.get(name)]
    if missing:
        pytest.skip(f"no Kubernetes to test on: {', '.join(missing)} not set")
    return Cluster(os.environ["TEST_REGISTRY"], os.environ["TEST_HOST"])


@pytest.fixture(scope="session")
def isolated_zenml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ZenML of its own, shared by the tests of a session; the user's is not touched.

    Gives its configuration folder.
    """
    from zenml.client import Client
    from zenml.config.global_config import GlobalConfiguration
    from zenml.integrations.registry import integration_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning of MLflow's as an error would cost ZenML the integration
        integration_registry.activate_integrations()
    folder = tmp_path_factory.mktemp("zenml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZENML_CONFIG_PATH", str(folder))
        patch.delenv("ZENML_ACTIVE_STACK_ID", raising=False)
        patch.delenv("ZENML_STORE_URL", raising=False)
        GlobalConfiguration._reset_instance()
        Client._reset_instance()
        yield folder
    GlobalConfiguration._reset_instance()
    Client._reset_instance()


@pytest.fixture
def fresh_zenml(isolated_zenml: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same ZenML as a new process finds it: no stack is active but the one on disk."""
    from zenml.client import Client
    from zenml.config.global_config import GlobalConfiguration

    monkeypatch.setenv("ZENML_ACTIVE_STACK_ID", "")
    monkeypatch.delenv("ZENML_ACTIVE_STACK_ID")
    GlobalConfiguration._reset_instance()
    Client._reset_instance()
    return isolated_zenml
