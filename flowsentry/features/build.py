"""Build a feature view of some recordings: its values and the manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from flowsentry.features import behaviour, paper
from flowsentry.features.views import Feature, FeatureSet, ViewManifest

VIEWS = {view.NAME: view for view in (behaviour, paper)}
_QUANTILES = {"q01": 0.01, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q99": 0.99}


def build(view: str, reports: pd.DataFrame, flows: pd.DataFrame, lineage: Mapping[str, str]) -> FeatureSet:
    """Compute a view.

    Args:
        view: `behaviour` or `paper`.
        reports: canonical reports with the column `flow`, arrival order within each recording.
        flows: their flow table.
        lineage: where the reports came from (files with digests, versions of rules).

    Returns:
        The values, one row per report (`behaviour`) or per flow (`paper`), with their manifest.
    """
    if view == paper.NAME:
        values, flow = paper.compute(flows), flows.index.to_numpy(np.int64)
    else:
        values, _ = behaviour.compute(reports)
        flow = reports["flow"].to_numpy(np.int64)
    module = VIEWS[view]
    rows = values.reset_index(drop=True)
    rows.insert(0, "flow", flow)
    manifest = ViewManifest(
        name=view,
        version=module.VERSION,
        features=module.FEATURES,
        warm_up_seconds=module.WARM_UP_SECONDS,
        digest=_digest(view, module.VERSION, module.FEATURES, rows),
        lineage=dict(lineage),
        statistics=statistics(rows, module.FEATURES),
    )
    return FeatureSet(manifest, rows)


def _digest(name: str, version: str, features: tuple[Feature, ...], rows: pd.DataFrame) -> str:
    definition = json.dumps([name, version, [feature.model_dump() for feature in features]], sort_keys=True)
    content = hashlib.sha256(definition.encode())
    for column in rows:
        content.update(pd.util.hash_pandas_object(rows[column], index=False).to_numpy().tobytes())
    return content.hexdigest()


def statistics(rows: pd.DataFrame, features: tuple[Feature, ...]) -> dict[str, dict[str, float]]:
    """The statistics of `ViewManifest`, of these rows."""
    result = {}
    for feature in features:
        if feature.kind == "category" or rows.empty:
            continue
        values = rows[feature.name].to_numpy(np.float64)
        quantiles = np.quantile(values, list(_QUANTILES.values()))
        result[feature.name] = {
            "count": float(len(values)),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values.min()),
            **{name: float(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
            "max": float(values.max()),
        }
    return result
