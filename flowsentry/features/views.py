"""Feature views: named, versioned sets of features, and the table of their values for a recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from flowsentry.errors import StoreError

Anomaly = Literal[
    "failed connections", "dead service", "fan-out", "burst", "volume", "persistence", "new contact", "learned pattern",
    "unusual value",
]  # fmt: skip
"""Failed connections: TCP flows without payload, many or a large share. Dead service: what is called never answered.
Fan-out: one client, many new edges. Burst: many more flows or failures than ever before. Volume: the same of bytes.
Persistence: a new edge that is used again and again. New contact: an edge or service outside the baseline. Learned
pattern: a value that only training has linked with attacks."""
Window = Literal["flow", "10s", "60s", "300s", "history", "training"]
"""The flow itself; the last seconds of its stream; the entity's own past; the rows that the model was trained on."""


class Feature(BaseModel):
    """One feature of a view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    unit: str
    description: str
    kind: Literal["number", "flag", "category"] = "number"
    """category: an identity or a name that the transform ranks; number and flag: used as they are."""
    harm: Literal[-1, 0, 1] = 0
    """Direction of harm: 1 if higher is worse, -1 if lower is worse, 0 if neither is known."""
    identity: bool = False
    """The value says who or when: an address, a port, an id or a time. It cannot hold elsewhere or tomorrow."""
    minimum_effect: float | None = None
    """A flow may only be flagged if at least one of its features is at or above its minimum effect."""
    anomaly: Anomaly = "unusual value"
    """What a harmful value stands for: the `anomaly_type` of a verdict whose first reason is this feature."""
    window: Window = "flow"
    """What the value is taken over or compared with: the `baseline_window` of such a verdict."""


class ViewManifest(BaseModel):
    """What a view is and where its values came from; travels with every model trained on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["paper", "behaviour"]
    version: str
    features: tuple[Feature, ...]
    warm_up_seconds: int
    """Seconds at the start of a recording whose flows teach the baseline and are not scored."""
    digest: str
    """SHA-256 (hex) of the values and of the definition above."""
    lineage: dict[str, str]
    """Where the values came from: files with their digests, label rule versions, row counts."""
    statistics: dict[str, dict[str, float]]
    """Per numeric feature: count, mean, std, min, q01, q25, q50, q75, q99, max; of a detector's view those of the
    benign rows that it was fitted on."""

    @property
    def names(self) -> list[str]:
        return [feature.name for feature in self.features]


@dataclass(frozen=True)
class FeatureSet:
    """The values of a view for some recordings."""

    manifest: ViewManifest
    rows: pd.DataFrame
    """`flow` (int64, index into the flow table) and one column per feature of the view; one row per report in
    arrival order (`behaviour`) or per flow (`paper`)."""

    def save(self, folder: Path) -> None:
        """Write the manifest (JSON) and the values (Parquet)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(self.manifest.model_dump_json(indent=1), encoding="utf-8")
        self.rows.to_parquet(folder / "values.parquet", index=False)

    @classmethod
    def load(cls, folder: Path) -> FeatureSet:
        """Read what `save` wrote.

        Raises:
            StoreError: something is missing or damaged.
        """
        try:
            manifest = ViewManifest.model_validate_json((folder / "manifest.json").read_text(encoding="utf-8"))
            rows = pd.read_parquet(folder / "values.parquet")
        except (OSError, ValueError, ValidationError) as error:
            raise StoreError(f"{folder}: not a stored feature view ({str(error).splitlines()[0]})") from error
        if list(rows.columns) != ["flow", *manifest.names]:
            raise StoreError(f"{folder}: manifest and values do not belong together; run the step again")
        return cls(manifest, rows)
