"""What the cache of every step depends on beside its inputs: our own code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def code_digest() -> str:
    """SHA-256 (hex) of all files of the packages that steps call.

    ZenML's own key covers the body of a step's function, not what it calls: without this a change of the domain
    would be answered with results of the old code.
    """
    digest = hashlib.sha256()
    for folder in ("flowsentry", "materializers", "steps"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
