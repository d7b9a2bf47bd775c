"""Objects of ours that save themselves into a folder and load themselves from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from zenml.enums import ArtifactType
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.metadata.metadata_types import MetadataType
from zenml.utils.io_utils import copy_dir

from flowsentry.detector import Detector
from flowsentry.features.splits import Splits
from flowsentry.features.views import FeatureSet
from flowsentry.learning.candidates import Candidate
from flowsentry.learning.quality_gate import Exposure


class _Stored(Protocol):
    def save(self, folder: Path) -> None: ...


class _FolderMaterializer(BaseMaterializer):
    SKIP_REGISTRATION: ClassVar[bool] = True

    def load(self, data_type: type[Any]) -> Any:
        with self.get_temporary_directory(delete_at_exit=True) as folder:
            copy_dir(f"{self.uri}/data", folder, overwrite=True)
            return self.ASSOCIATED_TYPES[0].load(Path(folder))

    def save(self, data: _Stored) -> None:
        with self.get_temporary_directory(delete_at_exit=True) as folder:
            data.save(Path(folder))
            copy_dir(folder, f"{self.uri}/data")


class FeatureSetMaterializer(_FolderMaterializer):
    """A feature view: manifest and values."""

    SKIP_REGISTRATION: ClassVar[bool] = False
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (FeatureSet,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def extract_metadata(self, data: FeatureSet) -> dict[str, MetadataType]:
        manifest = data.manifest
        return {
            "view": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "features": len(manifest.features),
            "rows": len(data.rows),
        }


class SplitsMaterializer(_FolderMaterializer):
    """The folds of all protocols."""

    SKIP_REGISTRATION: ClassVar[bool] = False
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Splits,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def extract_metadata(self, data: Splits) -> dict[str, MetadataType]:
        return {
            "folds": {fold.name: fold.note for fold in data.folds},
            "impossible": {str(protocol): reason for protocol, reason in data.impossible.items()},
        }


class CandidateMaterializer(_FolderMaterializer):
    """A trained family with its search, its scores in every fold and its detector."""

    SKIP_REGISTRATION: ClassVar[bool] = False
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Candidate,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.MODEL

    def extract_metadata(self, data: Candidate) -> dict[str, MetadataType]:
        return {
            "family": data.family,
            "params": dict(data.search.best),
            "search_metric": data.search.metric,
            "search_score": data.search.score,
            "trials": len(data.search.trials),
            "seconds": data.seconds,
        }


class ExposureMaterializer(_FolderMaterializer):
    """The flows that a detector has learned from."""

    SKIP_REGISTRATION: ClassVar[bool] = False
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Exposure,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def extract_metadata(self, data: Exposure) -> dict[str, MetadataType]:
        return {"flows": len(data.flows)}


class DetectorMaterializer(_FolderMaterializer):
    """What ships: transform, model, calibration, limit, view manifest and model card."""

    SKIP_REGISTRATION: ClassVar[bool] = False
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Detector,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.MODEL

    def extract_metadata(self, data: Detector) -> dict[str, MetadataType]:
        return {
            "family": data.model.family,
            "params": dict(data.model.params),
            "view": data.manifest.name,
            "view_digest": data.manifest.digest,
            "limit": data.limit,
        }
