"""A bundle: a Bento on disk with the detector, its view, the code that serves it and locked requirements.

`SHA256SUMS` lists every file (`sha256sum -c SHA256SUMS` checks a bundle without Python); the SHA-256 of that list is
the bundle's digest. Nothing in a bundle depends on when or where it was built: the same detector, code and lock give
the same digest. `__pycache__` folders, which running the code leaves behind, belong to no bundle and travel in no
archive.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, cast

import flowsentry
from flowsentry import telemetry
from flowsentry.errors import DeployError, StoreError

if TYPE_CHECKING:
    from flowsentry.detector import Detector

PACKAGE: Final = Path(flowsentry.__file__).parent
LOCK: Final = PACKAGE.parent / "requirements" / "serving.txt"
ENTRY: Final = "flowsentry.serving.service"
SUMS: Final = "SHA256SUMS"
LARGEST: Final = 1 << 30
"""Bytes that an archive may hold, unpacked."""
MOST: Final = 10_000
"""Files that an archive may hold."""
_CHUNK: Final = 1 << 20
_BENTOFILE: Final = f"""\
service: {ENTRY}:FlowSentry
name: flowsentry
description: FlowSentry answers flows with verdicts. bundle.json in src says by which model.
exclude: [requirements.txt]
python:
  requirements_txt: requirements.txt
  lock_packages: false
"""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, whole and unaltered when this was made."""

    path: Path
    digest: str

    @property
    def about(self) -> dict[str, Any]:
        """`bundle.json`: model_version, view, view_version, detector_digest, python."""
        return cast(dict[str, Any], json.loads((self.path / "src" / "bundle.json").read_text(encoding="utf-8")))


def build(detector: Detector, model_version: str, folder: Path) -> Bundle:
    """Build a Bento of a detector.

    Only the modules that the service imports are in it. BentoML runs in a process and a home of its own, resolves
    nothing and sends nothing.

    Args:
        detector: to be served.
        model_version: under which its verdicts are known.
        folder: is made; must not exist or be empty.

    Raises:
        DeployError: BentoML could not build it; with its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="flowsentry-build-") as scratch:
        stage = Path(scratch) / "stage"
        for path in modules(ENTRY):
            target = stage / path.relative_to(PACKAGE.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        detector.save(stage / "detector")
        about = {
            "model_version": model_version,
            "view": detector.manifest.name,
            "view_version": detector.manifest.version,
            "detector_digest": detector.digest,
            "python": ".".join(platform.python_version_tuple()[:2]),
        }
        (stage / "bundle.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        shutil.copyfile(LOCK, stage / "requirements.txt")
        (stage / "bentofile.yaml").write_text(_BENTOFILE, encoding="utf-8")
        version = hashlib.sha256(_sums(stage).encode()).hexdigest()[:16]
        _run_bentoml(stage, version, Path(scratch))
        made = Path(scratch) / "home" / "bentos" / "flowsentry" / version
        # BentoML adds itself to the lock again, without a hash; and the only time stamp.
        shutil.copyfile(LOCK, made / "env" / "python" / "requirements.txt")
        description = made / "bento.yaml"
        text = description.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^creation_time: .*$", "creation_time: '1980-01-01T00:00:00+00:00'", text)
        description.write_text(text, encoding="utf-8")
        shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    text = _sums(folder)
    (folder / SUMS).write_text(text, encoding="utf-8")
    return Bundle(folder, hashlib.sha256(text.encode()).hexdigest())


def _run_bentoml(stage: Path, version: str, scratch: Path) -> None:
    environment = {
        **os.environ,
        "BENTOML_HOME": str(scratch / "home"),
        # Else the whole lock is written into bento.yaml too, which every start would parse.
        "BENTOML_ENABLE_FEATURES": "no_image",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    telemetry.disable(environment)
    command = [sys.executable, "-m", "bentoml", "build", ".", "--version", version]
    done = subprocess.run(
        command, cwd=stage, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=300
    )
    if done.returncode != 0:
        raise DeployError(f"BentoML could not build a bundle:\n{tail(done.stdout + done.stderr, 15)}")


def tail(text: str, lines: int) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def modules(entry: str) -> list[Path]:
    """Files of our modules that a module imports, directly or not, at its top or in a function; itself included."""
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += _imports(name, ast.parse(path.read_text(encoding="utf-8")))
        if "." in name:
            waiting.append(name.rpartition(".")[0])
    if entry not in found:
        raise DeployError(f"there is no module {entry} to serve")
    return sorted(found.values())


def _file(name: str) -> Path | None:
    if name.partition(".")[0] != PACKAGE.name:
        return None
    place = PACKAGE.parent.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _imports(name: str, node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case _:
                yield from _imports(name, child)


def verify(folder: Path, digest: str | None = None) -> Bundle:
    """Recompute all sums of a bundle.

    Raises:
        StoreError: a file is altered, missing or new, or the bundle is another one than `digest` says.
    """
    try:
        said = (folder / SUMS).read_text(encoding="utf-8")
        found = _sums(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder}: not a bundle ({error}); build it again") from error
    if found != said:
        differing = sorted(set(found.splitlines()) ^ set(said.splitlines()), key=lambda line: line[66:])
        raise StoreError(f"{folder}: {differing[0][66:]} is not what was built; build the bundle again")
    computed = hashlib.sha256(said.encode()).hexdigest()
    if digest not in (None, computed):
        raise StoreError(f"{folder}: the bundle's digest is {computed[:12]}, not {str(digest)[:12]}")
    return Bundle(folder, computed)


def _files(folder: Path) -> list[Path]:
    """All files of a bundle but its sums, in order of their names.

    Raises:
        StoreError: there is something else than files and folders.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*names, *folders):
            path = Path(place, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise StoreError(f"{path}: a bundle holds only files")
        found += [Path(place, name) for name in names]
    return sorted((p for p in found if p != folder / SUMS), key=lambda p: p.relative_to(folder).as_posix())


def _sums(folder: Path) -> str:
    lines = []
    for path in _files(folder):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def pack(bundle: Bundle, archive: Path) -> None:
    """Write a bundle as one `.tar.gz`; equal bundles give equal bytes."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in [*_files(bundle.path), bundle.path / SUMS]:
            member = tarfile.TarInfo(path.relative_to(bundle.path).as_posix())
            member.size = path.stat().st_size
            member.mode = 0o755 if path.suffix == ".sh" else 0o644
            with path.open("rb") as file:
                tar.addfile(member, file)


def unpack(archive: Path, folder: Path, digest: str | None = None) -> Bundle:
    """Read what `pack` wrote into a new folder, and verify it.

    Raises:
        StoreError: the archive is damaged, holds something else than plain files below the folder, more than
            LARGEST bytes or MOST files, or another bundle than `digest` says. Nothing is left of it then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open("rb") as raw, gzip.GzipFile(fileobj=raw) as compressed:
            limited = cast(IO[bytes], _Limited(compressed))
            with tarfile.open(fileobj=limited, mode="r:") as tar:
                for count, member in enumerate(tar, 1):
                    if count > MOST:
                        raise StoreError(f"{archive}: holds more than {MOST:,} files")
                    _extract(tar, member, folder, archive)
        return verify(folder, digest)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StoreError(f"{archive}: not a bundle's archive ({error})") from error
    except StoreError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    name = PurePosixPath(member.name)
    plain = name.parts and not name.is_absolute() and not {"..", "__pycache__"} & set(name.parts)
    if not plain or "\\" in member.name or not member.isreg() or member.issparse():
        raise StoreError(f"{archive}: holds {member.name!r}, which is no file of a bundle")
    content = tar.extractfile(member)
    assert content is not None
    target = folder.joinpath(*name.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        shutil.copyfileobj(content, file, _CHUNK)
    target.chmod(0o755 if target.suffix == ".sh" else 0o644)


class _Limited:
    """Reads from a stream, but neither much at once (headers are read whole) nor beyond the largest archive."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise ValueError("a header is too long")
        content = self._stream.read(size)
        self._check()
        return content

    def seek(self, place: int) -> int:
        if place > LARGEST:
            self._refuse()
        return self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self) -> None:
        if self._stream.tell() > LARGEST:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(f"more than {LARGEST >> 20} MiB unpacked")


def warm(folder: Path) -> None:
    """Give an installed bundle what numba has compiled of the same sources on this machine, where there is such.

    Numba finds compiled code by the content of the source and the kind of processor. It is unpickled, so it never
    comes from a store: only from the running package of this machine.
    """
    for compiled in PACKAGE.rglob("__pycache__/*.nb[ic]"):
        source = compiled.parent.parent / f"{compiled.name.partition('.')[0]}.py"
        copy = folder / "src" / source.relative_to(PACKAGE.parent)
        if copy.is_file() and source.is_file() and copy.read_bytes() == source.read_bytes():
            target = copy.parent / "__pycache__" / compiled.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(compiled, target)
