"""Where the checkpoints of streams live: a folder, or an object store that fsspec reaches (`s3://bucket/prefix`).

Credentials of an object store come from the environment or the instance, as its client finds them; never from the URL.
So does the address of one that is not Amazon's: `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from flowsentry.errors import ConfigError, StoreError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")
_PART: Final = ".part"
_ABANDONED_SECONDS: Final = 3600
"""Age at which an unfinished file is nobody's: its writer was killed."""
LONGEST_SECONDS: Final = 60.0
"""How long an object store may take for one content; its client's own attempts and waits would add up to minutes."""
_S3_OPTIONS: Final = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2, "mode": "standard"}}
}


class Store(Protocol):
    """Named contents. A name is up to four parts of letters, digits, `.`, `_`, `-`, joined by `/`; none begins with a
    dot.

    Every method may be called from several threads, and raises StoreError if the name is another one or the store does
    not answer.
    """

    def read(self, name: str, most: int | None = None) -> bytes | None:
        """The content, or its first `most` bytes; None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Replace the content at once: a reader sees the old or the new one, whenever the writer dies."""

    def delete(self, name: str) -> None:
        """Remove the content if there is one."""


def open_store(place: str | Path) -> Store:
    """The store at a folder or a URL.

    Raises:
        ConfigError: the URL holds credentials, or what it names cannot be reached with what is installed.
    """
    text = str(place)
    if "://" not in text:
        return FolderStore(Path(text))
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or parts.fragment or "::" in text:
        raise ConfigError(
            "the address of a store of checkpoints is scheme://place/prefix; credentials come from the environment "
            "or the instance, never from the address"
        )
    if parts.scheme in {"file", "local"}:
        return FolderStore(Path(parts.path))
    return ObjectStore(text)


class FolderStore:
    """Contents are files; a written one is on the disk (fsync), not only in the system's cache."""

    def __init__(self, root: Path) -> None:
        self._root = root
        deadline = time.time() - _ABANDONED_SECONDS
        for unfinished in root.rglob(f".*{_PART}"):
            with suppress(OSError):
                if unfinished.stat().st_mtime < deadline:
                    unfinished.unlink()

    def read(self, name: str, most: int | None = None) -> bytes | None:
        path = self._path(name)
        try:
            with path.open("rb") as file:
                return file.read(-1 if most is None else most)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed("read", name, error) from error

    def write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise _failed("write", name, error) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink()
            _sync_folder(path.parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _failed("delete", name, error) from error

    def _path(self, name: str) -> Path:
        return self._root / _checked(name)


class ObjectStore:
    """Contents are objects of a file system of fsspec that replaces an object at once, as object stores do."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            # its caches of listings would hide what another replica wrote
            options = _S3_OPTIONS if urlsplit(url).scheme in {"s3", "s3a"} else {}
            files, root = url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(f"{url}: not a store of checkpoints that can be reached ({error})") from error
        self._files: Any = files
        self._root = str(root).rstrip("/")

    def read(self, name: str, most: int | None = None) -> bytes | None:
        path = self._path(name)
        try:
            return bytes(self._files.cat_file(path, start=None if most is None else 0, end=most, **self._bounds()))
        except FileNotFoundError:
            return None
        except Exception as error:  # each client has exceptions of its own
            raise _failed("read", name, error) from error

    def write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        try:
            self._files.pipe_file(path, content, **self._bounds())
        except Exception as error:
            raise _failed("write", name, error) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            self._files.rm_file(path, **self._bounds())
        except FileNotFoundError:
            return
        except Exception as error:
            raise _failed("delete", name, error) from error

    def _bounds(self) -> dict[str, float]:
        return {"timeout": LONGEST_SECONDS} if self._files.async_impl else {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{_checked(name)}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError("a name of a checkpoint has up to four parts of letters, digits, '.', '_' and '-'")
    return name


def _failed(action: str, name: str, error: Exception) -> StoreError:
    return StoreError(f"cannot {action} {name} in the store of checkpoints ({type(error).__name__}: {error})")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
