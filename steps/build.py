"""Step build: the bundle that serves a detector."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.client import Client

from flowsentry.detector import Detector
from flowsentry.serving import bundle as bundles
from flowsentry.serving.bundle import Bundle
from materializers import BundleMaterializer
from steps.register import MODEL


@step(output_materializers={"bundle": BundleMaterializer})
def build(detector: Detector, model_version: str) -> Annotated[Bundle, "bundle"]:
    """Build the Bento of a model version and note its digest with the version.

    Args:
        detector: to be served.
        model_version: under which its verdicts are known.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # stored after this step has returned
    bundle = bundles.build(detector, model_version, folder / "bundle")
    version = Client().get_model_version(MODEL, model_version)
    log_metadata(metadata={"bundle_digest": bundle.digest}, model_version_id=version.id)
    print(f"built the bundle {bundle.digest[:12]} of model version {model_version}")
    return bundle
