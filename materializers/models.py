"""Results of ours that are Pydantic models: one JSON file."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel
from zenml.enums import ArtifactType
from zenml.materializers.base_materializer import BaseMaterializer


class ModelMaterializer(BaseMaterializer):
    """A Pydantic model, read in JSON mode: ZenML's own reader refuses the tuples of a strict model."""

    SKIP_REGISTRATION: ClassVar[bool] = True
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (BaseModel,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA_ANALYSIS

    def load(self, data_type: type[Any]) -> Any:
        with self.artifact_store.open(f"{self.uri}/model.json", "r") as file:
            return data_type.model_validate_json(file.read())

    def save(self, data: BaseModel) -> None:
        with self.artifact_store.open(f"{self.uri}/model.json", "w") as file:
            file.write(data.model_dump_json(indent=1))
