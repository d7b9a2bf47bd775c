from __future__ import annotations

import subprocess
import sys

import pytest

from flowsentry import telemetry


def test_every_library_is_told_to_send_nothing() -> None:
    environment: dict[str, str] = {}
    telemetry.disable(environment)
    assert environment == telemetry.OFF


def test_a_setting_of_the_user_wins() -> None:
    environment = {"ZENML_ANALYTICS_OPT_IN": "true"}
    telemetry.disable(environment)
    assert environment["ZENML_ANALYTICS_OPT_IN"] == "true"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_one_switch_leaves_every_library_alone() -> None:
    environment = {telemetry.SWITCH: "on"}
    telemetry.disable(environment)
    assert environment == {telemetry.SWITCH: "on"}


ZENML = "from zenml.config.global_config import GlobalConfiguration as G; print(G().analytics_opt_in)"
MLFLOW = "from mlflow.telemetry.utils import is_telemetry_disabled as d; print(not d())"


@pytest.mark.slow
@pytest.mark.parametrize("question", [ZENML, MLFLOW], ids=["zenml", "mlflow"])
@pytest.mark.parametrize("disabled", [True, False], ids=["off", "untouched"])
def test_the_libraries_understand_it(question: str, disabled: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    # MLflow also stays silent where it finds a CI system or pytest, hence the almost empty environment
    environment = {"HOME": str(tmp_path_factory.mktemp("home"))}
    if disabled:
        telemetry.disable(environment)
    answer = subprocess.run(
        [sys.executable, "-c", question], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout.split()[-1] == str(not disabled)
