"""What the cache of every step depends on beside its inputs: our own code and what it runs on."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def code_digest() -> str:
    """SHA-256 (hex) of all files of the packages that steps call, all locked requirements and the version of Python.

    ZenML's own key covers the body of a step's function, not what it calls: without this a change of the domain
    would be answered with results of the old code.
    """
    digest = hashlib.sha256(f"{platform.python_version()}\0".encode())
    files = [ROOT / "requirements" / lock for lock in ("runtime.txt", "serving.txt")]
    for folder in ("flowsentry", "materializers", "steps"):
        files += sorted(path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    for path in files:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
