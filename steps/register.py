"""Step register: a version of the model at stage staging, with the decision that made it."""

from __future__ import annotations

from typing import Annotated

from zenml import get_step_context, log_metadata, step
from zenml.client import Client
from zenml.enums import ModelStages
from zenml.metadata.metadata_types import MetadataType
from zenml.model.utils import link_artifact_version_to_model_version

from flowsentry.detector import Detector
from flowsentry.learning.quality_gate import Exposure
from flowsentry.learning.selection import Selection
from steps.select import scores

MODEL = "flowsentry"


@step
def register(detector: Detector, exposure: Exposure, selection: Selection) -> Annotated[str, "model_version"]:
    """Make a model version of the detector, with the flows that it has learned from.

    Done by a step of its own: a model on the pipeline would get a new, empty version for every cached or failed run.
    """
    client = Client()
    try:
        model = client.get_model(MODEL)
    except KeyError:
        model = client.create_model(
            name=MODEL, license="Apache-2.0", description="Detects attacks on Kubernetes clusters from network flows"
        )
    version = client.create_model_version(model.id)
    for name in ("detector", "exposure"):
        link_artifact_version_to_model_version(get_step_context().inputs[name][0], version)
    metadata: dict[str, MetadataType] = {
        "family": detector.model.family,
        "params": dict(detector.model.params),
        "view": detector.manifest.name,
        "view_digest": detector.manifest.digest,
        "limit": detector.limit,
        "decision": str(selection.chosen),
        "reason": selection.reason,
        "scores": scores(selection),
    }
    log_metadata(metadata=metadata, model_version_id=version.id)
    version.set_stage(ModelStages.STAGING, force=True)
    return str(version.name)
