"""Serve MLflow's pages on what the local stack has tracked: python -m stacks.mlflow_ui [options of mlflow ui]."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from flowsentry import telemetry


def main() -> NoReturn:
    """Become `mlflow ui`."""
    telemetry.disable()
    from zenml.client import Client
    from zenml.integrations.mlflow.experiment_trackers import MLFlowExperimentTracker

    from stacks import apply, console

    console.quiet()
    apply.activate("local")
    tracker = Client().active_stack.experiment_tracker
    assert isinstance(tracker, MLFlowExperimentTracker)
    mlflow = str(Path(sys.executable).parent / "mlflow")
    os.execv(mlflow, [mlflow, "ui", "--workers", "1", "--backend-store-uri", tracker.get_tracking_uri(), *sys.argv[1:]])


if __name__ == "__main__":
    main()
