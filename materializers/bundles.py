"""Bundles as one archive, verified when they come back."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from zenml.enums import ArtifactType
from zenml.io import fileio
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.metadata.metadata_types import MetadataType

from flowsentry.serving.bundle import Bundle, pack, unpack


class BundleMaterializer(BaseMaterializer):
    """A Bento; the digest lies beside the archive and in the artifact's metadata."""

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Bundle,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.SERVICE

    def load(self, data_type: type[Any]) -> Bundle:
        """Unpack into a folder that lives as long as this process.

        Raises:
            StoreError: the archive is damaged, or holds another bundle than was saved.
        """
        with fileio.open(f"{self.uri}/digest.txt", "r") as file:
            digest = str(file.read()).strip()
        folder = Path(tempfile.mkdtemp(prefix="flowsentry-bundle-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with self.get_temporary_directory(delete_at_exit=True) as scratch:
            archive = Path(scratch, "bundle.tar.gz")
            fileio.copy(f"{self.uri}/bundle.tar.gz", str(archive))
            return unpack(archive, folder / "bundle", digest)

    def save(self, data: Bundle) -> None:
        """Write archive and digest."""
        with self.get_temporary_directory(delete_at_exit=True) as scratch:
            archive = Path(scratch, "bundle.tar.gz")
            pack(data, archive)
            fileio.copy(str(archive), f"{self.uri}/bundle.tar.gz")
        with fileio.open(f"{self.uri}/digest.txt", "w") as file:
            file.write(data.digest)

    def extract_metadata(self, data: Bundle) -> dict[str, MetadataType]:
        """Digest, and what the bundle says of itself."""
        return {"digest": data.digest, **data.about}
