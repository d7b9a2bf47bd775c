"""Where chance comes from."""

from __future__ import annotations

import numpy as np


def randomness(seed: int, part: str) -> np.random.Generator:
    """The source of randomness of one part, so that a change of one part leaves the others as they were.

    Args:
        seed: of the recording.
        part: name of the part.
    """
    key = tuple(part.encode())
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
