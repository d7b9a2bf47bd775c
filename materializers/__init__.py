"""How artifacts are stored and shown in the ZenML dashboard. No pickle anywhere."""

from materializers.bundles import BundleMaterializer
from materializers.folders import (
    CandidateMaterializer,
    DetectorMaterializer,
    ExposureMaterializer,
    FeatureSetMaterializer,
    SplitsMaterializer,
)
from materializers.models import ModelMaterializer
from materializers.tables import TableMaterializer

__all__ = [
    "BundleMaterializer",
    "CandidateMaterializer",
    "DetectorMaterializer",
    "ExposureMaterializer",
    "FeatureSetMaterializer",
    "ModelMaterializer",
    "SplitsMaterializer",
    "TableMaterializer",
]
