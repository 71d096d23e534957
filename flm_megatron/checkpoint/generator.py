"""A counter-based random generator: each value is a pure function of (seed, tensor name, global index).

So any process can make any region of a tensor and gets the bits that every other layout gets. Only IEEE additions,
multiplications, divisions and square roots are used, one array operation each, so that the bits do not depend on
the processor's vector unit or on the mathematics library either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from flm_megatron.checkpoint.inverse_normal import LARGEST_SIGMA, inverse_normal
from flm_megatron.checkpoint.logical import Region

CHUNK = 32768  # values made at a time: the working arrays stay in the second-level cache
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniform(seed: int, name: str, shape: tuple[int, ...], region: Region) -> torch.Tensor:
    """Uniform values in (0, 1) with 53 random bits: `region` of tensor `name` of `shape`, float64."""
    out = np.empty(region.numel, np.float64)
    work = _Workspace(seed, name)
    for start, index in _indices(tuple(shape), region):
        centred = work.centred_uniform(index)
        np.add(centred, 0.5, out=out[start : start + index.size])
    return torch.from_numpy(out).reshape(region.sizes)


def truncated_normal(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    region: Region,
    std: float,
    mean: float = 0.0,
    bound: float = 3.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normal values cut off at `bound` standard deviations: `region` of tensor `name` of `shape`.

    `std` and `mean` are those before the cut. Computed in float64, rounded to float32, then to `dtype`.

    Raises:
        ValueError: `bound` is not above 0 or beyond what the inverse distribution covers (6).
    """
    if not 0 < bound <= LARGEST_SIGMA:
        raise ValueError(f"bound is {bound} standard deviations: give one above 0 and at most {LARGEST_SIGMA}")
    # Rounded to 40 bits: mathematics libraries may differ in the last bit of erf.
    covered = round(math.erf(bound / math.sqrt(2)) * 2**40) / 2**40
    out = torch.empty(region.numel, dtype=dtype)
    work = _Workspace(seed, name)
    for start, index in _indices(tuple(shape), region):
        quantile = work.centred_uniform(index)
        quantile *= covered
        values = inverse_normal(quantile)
        values *= std
        values += mean
        out[start : start + index.size] = torch.from_numpy(values.astype(np.float32))
    return out.reshape(region.sizes)


class _Workspace:
    """The two keys of a tensor and the buffers that its values are made in."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
        self.key, self.second_key = np.frombuffer(digest, np.uint64)
        self.shifted = np.empty(CHUNK, np.uint64)
        self.uniform = np.empty(CHUNK, np.float64)

    def centred_uniform(self, index: np.ndarray) -> np.ndarray:
        """Values in (-1/2, 1/2), float64, of the same length as `index` (uint64, overwritten).

        The mixing is splitmix64's (Steele, Lea, Flood 2014), with a second key between its two rounds so that
        the streams of two names never run along each other.
        """
        bits, shifted, out = index, self.shifted[: index.size], self.uniform[: index.size]
        bits *= GOLDEN
        bits += self.key
        bits ^= np.right_shift(bits, np.uint64(30), out=shifted)
        bits *= MIX_1
        bits ^= self.second_key
        bits ^= np.right_shift(bits, np.uint64(27), out=shifted)
        bits *= MIX_2
        bits ^= np.right_shift(bits, np.uint64(31), out=shifted)
        bits >>= np.uint64(11)
        np.copyto(out, bits.view(np.int64))
        out += 0.5 - 2.0**52
        out *= 2.0**-53
        return out


def _indices(shape: tuple[int, ...], region: Region) -> Iterator[tuple[int, np.ndarray]]:
    """Row-major global indices of a region (uint64), at most CHUNK at a time, with their place in the region."""
    outer, run, corner = _runs(shape, region)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(outer))]
    ramp = np.arange(min(run, CHUNK), dtype=np.uint64)
    rows_at_once = max(1, CHUNK // max(run, 1))
    for row in range(0, math.prod(outer) if run else 0, rows_at_once):
        starts = _row_starts(range(row, min(row + rows_at_once, math.prod(outer))), outer, strides)
        for column in range(0, run, CHUNK):
            piece = ramp[: min(CHUNK, run - column)]
            yield row * run + column, ((starts + np.uint64(corner + column))[:, None] + piece).reshape(-1)


def _runs(shape: tuple[int, ...], region: Region) -> tuple[tuple[int, ...], int, int]:
    """Sizes of the outer axes, length of a contiguous run, and index of the region's first value."""
    axis = len(shape)
    while axis > 0 and (axis == len(shape) or region.sizes[axis] == shape[axis]):
        axis -= 1
    corner = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(region.offsets))
    return region.sizes[:axis], math.prod(region.sizes[axis:]), corner


def _row_starts(rows: range, outer: tuple[int, ...], strides: list[int]) -> np.ndarray:
    """Global index of the first value of each run, counted from the region's corner."""
    places = np.arange(rows.start, rows.stop, dtype=np.uint64)
    starts = np.zeros(len(rows), np.uint64)
    for size, stride in zip(reversed(outer), reversed(strides), strict=True):
        places, remainder = np.divmod(places, np.uint64(size))
        starts += remainder * np.uint64(stride)
    return starts
