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
    stack = Client().active_stack
    tracker = stack.experiment_tracker
    if not isinstance(tracker, MLFlowExperimentTracker):
        return False
    tracker.configure_mlflow()
    if tracker.config.tracking_uri is None and mlflow.get_experiment_by_name(EXPERIMENT) is None:
        # without a server, MLflow would leave files in whatever folder the run was started in
        mlflow.create_experiment(EXPERIMENT, artifact_location=f"{stack.artifact_store.path}/mlflow_artifacts")
    mlflow.set_experiment(EXPERIMENT)
    return True
