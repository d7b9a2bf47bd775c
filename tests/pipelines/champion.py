"""Model versions without a training run, and runs as run.py starts them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from zenml import log_metadata, save_artifact
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.model.utils import link_artifact_version_to_model_version
from zenml.models import ModelVersionResponse, PipelineRunResponse

import run as program
from flowsentry import detector as detectors
from flowsentry.detector import Detector
from flowsentry.features.build import build
from flowsentry.features.splits import make_splits
from flowsentry.flows import labels
from flowsentry.flows.places import places
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.families import FAMILIES
from flowsentry.learning.quality_gate import Exposure
from flowsentry.serving.deployer import Deployed, Record
from flowsentry.simulation import SimulationSettings, simulate
from materializers import DetectorMaterializer, ExposureMaterializer
from steps.register import MODEL


def trained(family: str = "decision_tree") -> Detector:
    """A detector of a simulated hour."""
    raw = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    flows = collapse(reports)
    flows["place"] = places(flows)
    features = build("behaviour", reports, flows, {})
    splits = make_splits(flows, seed=0, warm_up_seconds=features.manifest.warm_up_seconds, rotations=1)
    of_row = features.rows["flow"]
    malicious = is_malicious(flows["label"])
    fit = of_row.isin(splits.rows("random", "fit")).to_numpy()
    calibration = of_row.isin(splits.rows("random", "calibration")).to_numpy() & ~malicious[of_row]
    return detectors.fit(
        FAMILIES[family],
        {name: values[0] for name, values in FAMILIES[family].grid.items()},
        features.manifest,
        features.rows[fit],
        malicious[of_row][fit],
        flows["exchange"].to_numpy()[of_row][fit],
        features.rows[calibration],
        target_fpr=0.005,
        needs_effect=True,
        seed=0,
    )


def register(detector: Detector, *, digest: str | None = None, learned: Exposure | None = None) -> ModelVersionResponse:
    """A new version of the model, at no stage; with the digest of its bundle it can be known as the champion."""
    client = Client()
    try:
        model = client.get_model(MODEL)
    except KeyError:
        model = client.create_model(name=MODEL)
    version = client.create_model_version(model.id)
    artifact = save_artifact(detector, "detector", materializer=DetectorMaterializer)
    link_artifact_version_to_model_version(artifact, version)
    if learned is not None:
        exposure = save_artifact(learned, "exposure", materializer=ExposureMaterializer)
        link_artifact_version_to_model_version(exposure, version)
    if digest is not None:
        log_metadata(metadata={"bundle_digest": digest}, model_version_id=version.id)
    return client.get_model_version(MODEL, version.name)


@contextlib.contextmanager
def no_model() -> Iterator[None]:
    """No version of the model, before and after."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    with contextlib.suppress(KeyError):
        Client().delete_model(MODEL)


def deployed(version: ModelVersionResponse | str, digest: str) -> Record:
    """What the deployer says if this is the champion."""
    name = version if isinstance(version, str) else str(version.name)
    return Record(champion=Deployed(model_version=name, digest=digest, url="http://127.0.0.1:1"))


@dataclass(frozen=True)
class Ran:
    """What `python run.py ...` did."""

    status: int
    out: str
    err: str
    run: PipelineRunResponse
    folder: Path
    """Of its reports."""

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    @property
    def states(self) -> dict[str, ExecutionStatus]:
        return {name: step.status for name, step in self.run.steps.items()}

    def load(self, step: str, output: str) -> Any:
        (artifact,) = self.run.steps[step].outputs[output]
        return artifact.load()


def start(pipeline: str, *arguments: str) -> Ran:
    """In the working folder, which has its config in `config.yaml`."""
    status, out, err = refused(pipeline, *arguments)
    (last,) = Client().list_pipeline_runs(sort_by="desc:created", size=1).items
    return Ran(status, out, err, Client().get_pipeline_run(last.id), Path("reports", last.name).absolute())


def refused(pipeline: str, *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a run that may not have begun."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program.main(["--pipeline", pipeline, "--config", "config.yaml", *arguments])
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return status, out.getvalue(), err.getvalue()


def recording(seed: int, **settings: Any) -> pd.DataFrame:
    """A simulated recording that no detector here has seen."""
    return simulate(SimulationSettings(seed=seed, **{"minutes": 60, "scale": 0.1, "episodes": 1, **settings}))
