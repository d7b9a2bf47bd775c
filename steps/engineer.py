"""Step engineer: from validated reports to flows, a feature view and splits."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, step
from zenml.types import HTMLString

from flowsentry.config import SplitSettings
from flowsentry.features.build import build
from flowsentry.features.splits import Splits, make_splits
from flowsentry.features.views import FeatureSet
from flowsentry.flows.places import places
from flowsentry.flows.reports import collapse
from flowsentry.reporting.report import view_html
from materializers import FeatureSetMaterializer, SplitsMaterializer, TableMaterializer


@step(
    output_materializers={
        "flows": TableMaterializer,
        "features": FeatureSetMaterializer,
        "splits": SplitsMaterializer,
    }
)
def engineer(
    reports: pd.DataFrame, files: dict[str, str], rules: dict[str, str], view: str, settings: SplitSettings
) -> tuple[
    Annotated[pd.DataFrame, "flows"],
    Annotated[FeatureSet, "features"],
    Annotated[Splits, "splits"],
    Annotated[HTMLString, "view_page"],
]:
    """Compute a view of the reports and divide the flows for every protocol.

    Args:
        reports: validated, with flow numbers and derived labels.
        files: digests by file.
        rules: versions of the label and exchange rules by recording.
        view: `behaviour` or `paper`.
        settings: how the flows are divided.

    Returns:
        Flow table with `place`, the view's values, the splits, and a page about the view.
    """
    flows = collapse(reports)
    flows["place"] = places(flows)
    lineage = {f"file {name}": digest for name, digest in files.items()}
    lineage |= {f"rules {recording}": versions for recording, versions in rules.items()}
    features = build(view, reports, flows, lineage)
    splits = make_splits(
        flows,
        seed=settings.seed,
        warm_up_seconds=features.manifest.warm_up_seconds,
        rotations=settings.rotations,
    )
    log_metadata(
        {
            "flows": len(flows),
            "view_digest": features.manifest.digest,
            "impossible_protocols": {str(name): reason for name, reason in splits.impossible.items()},
        }
    )
    return flows, features, splits, HTMLString(view_html(features, flows["corrected"]))
