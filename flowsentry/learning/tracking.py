"""A candidate in MLflow: one run, a nested run for each trial of its search, and the stored model as files.

Nothing is logged by MLflow's own model flavours, which pickle. Where runs go (tracking address, experiment) is
configured before, by MLflow's environment variables or ZenML's experiment tracker.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import mlflow
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from numpy.typing import NDArray

from flowsentry.learning.families import Family
from flowsentry.learning.model import Parameters
from flowsentry.learning.search import SearchResult, Trial

CONFUSION_FILE: Final = "confusion.png"
MODEL_FOLDER: Final = "model"


def log_candidate(
    family: Family,
    params: Parameters,
    *,
    result: SearchResult | None,
    metrics: Mapping[str, float],
    confusion: Mapping[str, NDArray[np.int64]],
    tags: Mapping[str, str],
    model_folder: Path,
) -> str:
    """Log one candidate; nested in the active run, if there is one, else a run of its own.

    Args:
        family: of the candidate.
        params: chosen for it.
        result: of its search, None if it had none. Every trial becomes a nested run.
        metrics: name, such as `family/recall/corrected`, to value.
        confusion: title, such as a protocol's name, to counts [[true benign, false alarm], [missed, found]]; one
            picture shows them all.
        tags: at least `data_digest` and `view_digest`.
        model_folder: what `Model.save` or the detector wrote; its files become artifacts under `model`.

    Returns:
        The id of the candidate's run.
    """
    with mlflow.start_run(run_name=family.name, nested=mlflow.active_run() is not None) as run:
        mlflow.set_tags({"family": family.name, **tags})
        mlflow.log_params(dict(params))
        mlflow.log_metrics(dict(metrics))
        mlflow.log_artifacts(str(model_folder), MODEL_FOLDER)
        if confusion:
            with tempfile.TemporaryDirectory() as folder:
                picture = Path(folder) / CONFUSION_FILE
                draw_confusion(family.title, confusion, picture)
                mlflow.log_artifact(str(picture))
        if result is not None:
            mlflow.log_metric(f"search/{result.metric}", result.score)
            for number, trial in enumerate(result.trials):
                _log_trial(f"{family.name} {number:02d}", trial, result.metric, run.info)
        return str(run.info.run_id)


def _log_trial(name: str, trial: Trial, metric: str, parent: mlflow.entities.RunInfo) -> None:
    # The client writes a trial in three calls; the fluent interface needs one for each value.
    client = mlflow.MlflowClient()
    run = client.create_run(parent.experiment_id, tags={MLFLOW_PARENT_RUN_ID: parent.run_id}, run_name=name)
    now = int(time.time() * 1000)
    values = {metric: trial.score, "rows": float(trial.rows), "seconds": trial.seconds}
    client.log_batch(
        run.info.run_id,
        metrics=[
            *(Metric(key, value, now, 0) for key, value in values.items()),
            *(Metric(f"{metric}/fold", value, now, fold) for fold, value in enumerate(trial.scores_per_fold)),
        ],
        params=[Param(key, str(value)) for key, value in trial.params.items()],
    )
    client.set_terminated(run.info.run_id)


def draw_confusion(title: str, confusion: Mapping[str, NDArray[np.int64]], file: Path) -> None:
    """Write a PNG with a confusion matrix for each entry, counts and the share of their row, side by side."""
    figure = Figure(figsize=(0.6 + 3.2 * len(confusion), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, len(confusion), squeeze=False)[0]
    for axes, (name, counts) in zip(panels, confusion.items(), strict=True):
        share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10)
        axes.set_xticks([0, 1], ["benign", "malicious"])
        axes.set_yticks([0, 1], ["benign", "malicious"], rotation=90, va="center")
        axes.set_xlabel("verdict")
        axes.set_ylabel("label")
        for row in range(2):
            for column in range(2):
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]:,}\n{share[row, column]:.2%}",
                    ha="center",
                    va="center",
                    color="white" if share[row, column] > 0.5 else "black",
                )
    figure.savefig(file, dpi=100)
