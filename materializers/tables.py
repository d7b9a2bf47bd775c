"""Flow tables and quarantine: Parquet, with a few rows to look at."""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd
import pyarrow.parquet as pq
from zenml.enums import ArtifactType, VisualizationType
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.metadata.metadata_types import MetadataType

SHOWN_ROWS = 50


class TableMaterializer(BaseMaterializer):
    """A pandas table."""

    # ZenML would otherwise use it for every table of every project in this process.
    SKIP_REGISTRATION: ClassVar[bool] = True
    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (pd.DataFrame,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA

    def load(self, data_type: type[Any]) -> pd.DataFrame:
        with self.artifact_store.open(f"{self.uri}/table.parquet", "rb") as file:
            stored = pq.read_table(file)
        table: pd.DataFrame = stored.to_pandas()
        # Parquet does not say how pandas held its strings, and loses categories that no row has.
        dtypes = {name: "string[pyarrow]" for name, dtype in table.dtypes.items() if isinstance(dtype, pd.StringDtype)}
        columns = stored.schema.pandas_metadata["columns"]
        dtypes |= {column["name"]: "category" for column in columns if column["pandas_type"] == "categorical"}
        return table.astype(dtypes)

    def save(self, data: pd.DataFrame) -> None:
        with self.artifact_store.open(f"{self.uri}/table.parquet", "wb") as file:
            data.to_parquet(file)

    def save_visualizations(self, data: pd.DataFrame) -> dict[str, VisualizationType]:
        path = f"{self.uri}/first_rows.csv"
        with self.artifact_store.open(path, "w") as file:
            file.write(data.head(SHOWN_ROWS).to_csv(index=False))
        return {path: VisualizationType.CSV}

    def extract_metadata(self, data: pd.DataFrame) -> dict[str, MetadataType]:
        return {"rows": len(data), "columns": len(data.columns)}
