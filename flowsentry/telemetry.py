"""Usage reports of the libraries: off, unless the user turns them on."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

SWITCH: Final = "FLOWSENTRY_TELEMETRY"
"""Set to `on`, every library decides for itself, as if FlowSentry did nothing."""

OFF: Final[dict[str, str]] = {
    "ZENML_ANALYTICS_OPT_IN": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "BENTOML_DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    "DO_NOT_TRACK": "true",  # Evidently has no variable of its own; MLflow obeys this one too
}
"""Environment variables by which each library is told to send nothing."""


def disable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell every library to send nothing; a variable that the user has set stays as it is.

    Has to be called before the libraries are imported: some read their variable only then.
    """
    if environment.get(SWITCH) == "on":
        return
    for name, value in OFF.items():
        environment.setdefault(name, value)
