"""Flows for steps that run on another machine: their files in the artifact store, by content.

A recording is uploaded once, to `flows/<digest of names and contents>/` in the store, and a step that runs elsewhere
reads a copy of it under the same names: the flows, and so all that is computed from them, are the same everywhere.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from zenml.client import Client
from zenml.io import fileio
from zenml.utils import io_utils

from flowsentry.config import PipelineConfig
from flowsentry.errors import SourceError
from flowsentry.flows import sources

FOLDER: Final = "flows"


def shared(config: PipelineConfig) -> tuple[list[str], dict[str, str]]:
    """What step load is told of the config's data, uploaded first if the stack's artifact store is not on this machine.

    Returns:
        Files, folders and globs, or the places of their copies, none if flows are simulated; SHA-256 (hex) of every
        file.

    Raises:
        SourceError: a file is missing, of no known layout, or changed meanwhile.
    """
    if config.simulated:
        return [], {}
    digests = sources.digests(config.data)
    store = Client().active_stack.artifact_store
    if store.config.is_local:
        return list(config.data), digests
    return [_upload(entry, store.path) for entry in config.data], digests


def _upload(entry: str, store: str) -> str:
    """Where step load finds a copy of a recording."""
    [(recording, files)] = sources.recordings([entry])
    contents = {file: _digest(file) for file in files}
    digest = hashlib.sha256()
    for file, content in contents.items():
        digest.update(f"{file.name}\0{content}\0".encode())
    folder = f"{store}/{FOLDER}/{digest.hexdigest()}"
    single = Path(entry).is_file()
    place = f"{folder}/{files[0].name}" if single else f"{folder}/{recording}"
    for file in files:
        target = place if single else f"{place}/{file.name}"
        if not fileio.exists(target):
            fileio.makedirs(target.rpartition("/")[0])
            print(f"uploading {file} for the steps to read", flush=True)
            fileio.copy(str(file), target)
            if _digest(file) != contents[file]:  # otherwise it would stand for the earlier content for ever
                fileio.remove(target)
                raise SourceError(f"{file} changed while it was uploaded; run it again")
    return place


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def at_hand(data: Sequence[str]) -> Iterator[list[str]]:
    """The same data as paths of this machine: what was uploaded is copied to a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield [_download(place, Path(folder) / str(number)) for number, place in enumerate(data)]


def _download(place: str, folder: Path) -> str:
    if not io_utils.is_remote(place):
        return place
    target = folder / place.rsplit("/", 1)[-1]
    if fileio.isdir(place):
        io_utils.copy_dir(place, str(target))
    else:
        folder.mkdir()
        fileio.copy(place, str(target))
    return str(target)
