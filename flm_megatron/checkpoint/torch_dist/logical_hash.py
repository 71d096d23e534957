"""A hash of logical tensors that does not depend on how they are cut into regions.

The hash of a tensor is sum(row_weight[r] * column_weight[c] * bits[r, c]) modulo 2^64, with the last axis as
columns, the others as rows, and odd pseudo-random weights: a multilinear hash. Regions are hashed in any order
and their sums added. It guards against accidents (a flipped bit always changes it), not against forgery.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch

from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.regions import split_region

MODULUS = 2**64
BLOCK = 32768  # values hashed at a time: the working array stays in the second-level cache
READ_BYTES = 32 * 2**20
ROW_KEY, COLUMN_KEY = np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def partial_hash(shape: tuple[int, ...], region: Region, values: torch.Tensor) -> int:
    """A region's summand of the hash of its tensor of `shape`: add those of all regions modulo 2^64.

    `values` is a CPU tensor of shape `region.sizes`; its bits are hashed, so the dtype matters.
    """
    if not region.numel:
        return 0
    bits = values.contiguous().reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[values.dtype.itemsize])
    columns, first = (region.sizes[-1], region.offsets[-1]) if shape else (1, 0)
    bits = bits.reshape(-1, columns)
    column_weights = _column_weights(first, columns)
    sums = np.zeros(len(bits), np.uint64)
    width = min(columns, BLOCK)
    height = max(1, BLOCK // width)
    work = np.empty((height, width), np.uint64)
    for row in range(0, len(bits), height):
        for column in range(0, columns, width):
            block = bits[row : row + height, column : column + width]
            wide = work[: block.shape[0], : block.shape[1]]
            np.copyto(wide, block)
            sums[row : row + height] += np.einsum("ij,j->i", wide, column_weights[column : column + width])
    sums *= _weights(_rows(shape[:-1], region), ROW_KEY)
    return int(sums.sum())


def tensor_hash(info: TensorInfo, total: int) -> str:
    """Hash of a whole tensor as hex digits: the sum over its regions with its shape and dtype."""
    text = f"{str(info.dtype).removeprefix('torch.')} {tuple(info.shape)} {total % MODULUS:016x}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """One hash of many tensors by name."""
    text = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tensor_hashes(
    checkpoint: LogicalCheckpoint, names: Iterable[str] | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    """Hash of each tensor of a checkpoint (of `names` only, if given), reading at most 32 MiB at a time.

    `progress` is called with the number of bytes read since its last call.
    """
    hashes = {}
    for name in checkpoint.tensors if names is None else names:
        info, total = checkpoint.tensors[name], 0
        for region in split_region(Region.whole(info.shape), READ_BYTES // info.dtype.itemsize):
            total += partial_hash(info.shape, region, checkpoint.read(name, region))
            if progress:
                progress(region.numel * info.dtype.itemsize)
        hashes[name] = tensor_hash(info, total)
    return hashes


def logical_hash(checkpoint: LogicalCheckpoint, names: Iterable[str] | None = None) -> str:
    """One hash of all tensors of a checkpoint (of `names` only, if given), whatever its layout and format."""
    return combine_hashes(tensor_hashes(checkpoint, names))


@lru_cache(maxsize=8)
def _column_weights(first: int, count: int) -> np.ndarray:
    return _weights(np.arange(first, first + count, dtype=np.uint64), COLUMN_KEY)


def _rows(outer: tuple[int, ...], region: Region) -> np.ndarray:
    """Global row numbers of a region, all axes but the last counted row-major."""
    rows = np.zeros(1, np.uint64)
    for axis in range(len(outer)):
        stride = math.prod(outer[axis + 1 :])
        places = np.arange(region.offsets[axis], region.offsets[axis] + region.sizes[axis], dtype=np.uint64)
        rows = (rows[:, None] + places * np.uint64(stride)).reshape(-1)
    return rows


def _weights(index: np.ndarray, key: np.uint64) -> np.ndarray:
    """Odd pseudo-random weights: splitmix64's mixing (Steele, Lea, Flood 2014) of index and key."""
    bits = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (bits ^ (bits >> np.uint64(31))) | np.uint64(1)
