"""The experiment tracker of the active stack."""

from __future__ import annotations

import mlflow
from zenml.client import Client
from zenml.integrations.mlflow.experiment_trackers import MLFlowExperimentTracker

EXPERIMENT = "flowsentry"


def connect() -> bool:
    """Point MLflow at the stack's tracker; False if the stack has none.

    Done by hand, since ZenML's own hook imports every flavour of MLflow after each step.
    """
    tracker = Client().active_stack.experiment_tracker
    if not isinstance(tracker, MLFlowExperimentTracker):
        return False
    tracker.configure_mlflow()
    mlflow.set_experiment(EXPERIMENT)
    return True
