"""`python -m flowsentry.serving.fetch URL DIGEST FOLDER`: what a pod does before it serves.

Credentials and the endpoint of an object store come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, ...) or from the instance, as its client finds them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from flowsentry.errors import ConfigError, FlowSentryError, StoreError
from flowsentry.serving import bundle as bundles
from flowsentry.serving.bundle import Bundle
from flowsentry.serving.store import open_store

LARGEST: Final = 256 << 20
"""Bytes that an archive may have."""
_DIGEST: Final = re.compile("[0-9a-f]{64}")


def fetch(url: str, digest: str, folder: Path, *, largest: int = LARGEST) -> Bundle:
    """Bring the bundle of a digest to a folder, with machine code where this package has it.

    Nothing is fetched if it is there already, whole. The folder appears at once: either there is a verified bundle, or
    there is none.

    Args:
        url: of the archive that `bundle.pack` wrote; `s3://bucket/name.tar.gz`, or a path.
        digest: of the bundle.
        folder: to become the bundle; what else is there is removed.
        largest: bytes that the archive may have.

    Raises:
        ConfigError: the address or the digest is none.
        StoreError: there is no such archive, the store does not answer, or the archive is too large, damaged or of
            another bundle.
    """
    if not _DIGEST.fullmatch(digest):
        raise ConfigError("a bundle's digest has 64 digits 0-9, a-f")
    if (folder / bundles.SUMS).is_file():
        try:
            return bundles.verify(folder, digest)
        except StoreError:
            pass  # left by a run that was killed, or of another bundle
    place, _, name = url.rpartition("/")
    content = _read(place or ".", name, largest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        archive, fresh = Path(scratch, name), Path(scratch, "bundle")
        archive.write_bytes(content)
        bundles.unpack(archive, fresh, digest)
        bundles.warm(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)
    return Bundle(folder, digest)


def _read(place: str, name: str, largest: int) -> bytes:
    store = open_store(place)
    try:
        content = store.read(name, largest + 1)
    except StoreError as error:
        raise StoreError(f"{place}/{name}: cannot be fetched: {_cause(error)}") from error
    if content is None:
        raise StoreError(f"{place}/{name}: there is no such bundle; deploy the model again")
    if len(content) > largest:
        raise StoreError(f"{place}/{name}: is larger than {largest >> 20} MiB, and so no bundle of ours")
    return content


def _cause(error: BaseException) -> str:
    """The first error of a chain, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def main() -> int:
    """Fetch; 0, or 1 after one line on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m flowsentry.serving.fetch", description=fetch.__doc__)
    parser.add_argument("url")
    parser.add_argument("digest")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        bundle = fetch(arguments.url, arguments.digest, arguments.folder.absolute())
    except (FlowSentryError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"model version {bundle.about['model_version']}, bundle {bundle.digest[:12]}, is in {bundle.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
