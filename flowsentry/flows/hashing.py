"""Open-addressing hash tables of 64-bit keys for compiled code, and the hashes that make the keys.

Keys are hashes of text or mixes of hashes: among a million keys, some two collide with a probability of 3e-8.
0 marks an empty slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import pandas as pd
import pyarrow as pa

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile on first use without the interpreter lock and keep the machine code on disk."""
    return cast(Function, numba.njit(cache=True, nogil=True)(function))


@compiled
def mix(first: np.uint64, second: np.uint64) -> np.uint64:
    """Combine two keys, order matters, result never 0. Finaliser of splitmix64 (Steele et al. 2014)."""
    z = np.uint64(first) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(second) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z if z != np.uint64(0) else np.uint64(1)


@compiled
def hash_bytes(offsets: np.ndarray, data: np.ndarray) -> np.ndarray:
    """What `hash_text` gives for the texts `data[offsets[i]:offsets[i + 1]]`, int64 [texts + 1] and uint8 in UTF-8."""
    result = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(result)):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        result[i] = mix(h, np.uint64(offsets[i + 1] - offsets[i]))
    return result


def hash_text(texts: pd.Series) -> np.ndarray:
    """64-bit hash (FNV-1a, mixed) of every text; the same on every machine and in every process.

    Args:
        texts: strings or a category of strings; missing counts as the empty text.

    Returns:
        uint64 array, never 0.
    """
    if isinstance(texts.dtype, pd.CategoricalDtype):
        hashes = hash_text(pd.Series(texts.cat.categories.astype("string[pyarrow]")))
        with_missing = np.append(hashes, hash_text(pd.Series([""], dtype="string[pyarrow]")))
        return with_missing[texts.cat.codes.to_numpy()]
    if len(texts) == 0:
        return np.empty(0, np.uint64)
    array = pa.array(texts.fillna(""), type=pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    _, offsets, data = array.buffers()
    starts = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return hash_bytes(starts, content)


@compiled
def find(keys: np.ndarray, key: np.uint64) -> int:
    """Slot of `key`, or the empty one where it belongs. `keys` has a power of two of slots, one at least is empty."""
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while keys[slot] != np.uint64(0) and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)  # type: ignore[return-value]


@compiled
def place_all(old_keys: np.ndarray, keep: np.ndarray, new_keys: np.ndarray) -> np.ndarray:
    """Put the kept keys into an empty table; returns for every old slot its new one, or -1."""
    moved = np.full(len(old_keys), -1, np.int64)
    for i in range(len(old_keys)):
        if keep[i]:
            slot = find(new_keys, old_keys[i])
            new_keys[slot] = old_keys[i]
            moved[i] = slot
    return moved
