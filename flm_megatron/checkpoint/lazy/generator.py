"""A counter-based random generator: each value is a pure function of (seed, tensor name, global index).

So any process can make any region of a tensor and gets the bits that every other layout gets. Only integer operations
and IEEE additions, multiplications, divisions and square roots are used, one array operation each, so that the bits
do not depend on the processor's vector unit or on the mathematics library either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.without_values import stand_in

CHUNK = 32768  # values made at a time: the working arrays stay in the second-level cache
KNOT_BITS, FRACTION_BITS = 16, 24
LARGEST_BOUND = 4.0  # further out the knots lie too far apart
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
CENTRE_LIMIT = 0.425  # |p - 1/2| up to which the central approximation holds

# Wichura, algorithm AS 241 (1988), PPND16: relative error about 1e-16. Highest power first.
CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip


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

    `std` and `mean` are those before the cut. The inverse distribution function is exact at 65,537 knots evenly spaced
    in probability, and a straight line between them: off by less than 5e-6 standard deviations at a bound of 3,
    5e-3 at 4. Values are made in float32, then rounded to `dtype`.

    Raises:
        ValueError: `bound` is not above 0 or larger than 4.
    """
    if not 0 < bound <= LARGEST_BOUND:
        raise ValueError(f"bound is {bound} standard deviations: give one above 0 and at most {LARGEST_BOUND}")
    undrawn = stand_in(None, region.sizes, dtype)
    if undrawn is not None:
        return undrawn
    lines = _lines(std, mean, bound)
    out = torch.empty(region.numel, dtype=dtype)
    values = out.numpy() if dtype == torch.float32 else np.empty(region.numel, np.float32)
    bits = _Bits(seed, name)
    for start, index in _indices(tuple(shape), region):
        bits.interpolate(index, lines, values[start : start + index.size])
    return (out if dtype == torch.float32 else out.copy_(torch.from_numpy(values))).reshape(region.sizes)


@lru_cache(maxsize=16)
def _lines(std: float, mean: float, bound: float) -> np.ndarray:
    """Value and rise of each straight piece side by side, as one complex number: one look-up for both."""
    knots = _knots(bound) * std + mean
    lines = np.empty(knots.size - 1, np.complex64)
    lines.real, lines.imag = knots[:-1], np.diff(knots)
    return lines


@lru_cache(maxsize=4)
def _knots(bound: float) -> np.ndarray:
    """The standard normal's inverse distribution function at evenly spaced probabilities from -bound to bound."""
    # Rounded to 40 bits: mathematics libraries may differ in the last bit of erf.
    covered = round(math.erf(bound / math.sqrt(2)) * 2**40) / 2**40
    return _inverse_normal((np.arange(2**KNOT_BITS + 1) / 2**KNOT_BITS - 0.5) * covered)


class _Bits:
    """The two keys of a tensor, and the buffers that its random bits pass through."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
        self.key, self.second_key = np.frombuffer(digest, np.uint64)
        self.shifted = np.empty(CHUNK, np.uint64)
        self.fraction = np.empty(CHUNK, np.float32)
        self.line = np.empty(CHUNK, np.complex64)

    def interpolate(self, index: np.ndarray, lines: np.ndarray, out: np.ndarray) -> None:
        """Points of `lines` for `index` (uint64, overwritten): the upper bits choose the line, the next its point."""
        size = index.size
        shifted, fraction, line = self.shifted[:size], self.fraction[:size], self.line[:size]
        self._mix(index, shifted)
        piece = np.right_shift(index, np.uint64(64 - KNOT_BITS), out=shifted).view(np.int64)
        np.take(lines, piece, out=line, mode="clip")
        index <<= np.uint64(KNOT_BITS)
        index >>= np.uint64(64 - FRACTION_BITS)
        np.copyto(fraction, index.view(np.int64), casting="unsafe")
        fraction *= np.float32(2.0**-FRACTION_BITS)
        np.multiply(line.imag, fraction, out=out)
        out += line.real

    def _mix(self, bits: np.ndarray, shifted: np.ndarray) -> None:
        """64 random bits for each index, in place.

        The mixing is splitmix64's (Steele, Lea, Flood 2014), with a second key between its two rounds so that
        the streams of two names never run along each other.
        """
        bits *= GOLDEN
        bits += self.key
        bits ^= np.right_shift(bits, np.uint64(30), out=shifted)
        bits *= MIX_1
        bits ^= self.second_key
        bits ^= np.right_shift(bits, np.uint64(27), out=shifted)
        bits *= MIX_2
        bits ^= np.right_shift(bits, np.uint64(31), out=shifted)


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


def _inverse_normal(centred: np.ndarray) -> np.ndarray:
    """z with Phi(z) = 1/2 + `centred`, for |z| up to 6; float64 in and out, of the same shape (one axis).

    Only additions, multiplications, divisions and square roots are used, so the bits are the same everywhere.
    """
    inside = CENTRE_LIMIT * CENTRE_LIMIT - centred * centred
    values = _ratio(CENTRE, inside)
    values *= centred
    (places,) = np.nonzero(inside < 0)
    if places.size:
        outer = centred[places]
        root = np.sqrt(-_log(0.5 - np.abs(outer)))
        root -= 1.6
        values[places] = np.copysign(_ratio(TAIL, root), outer)
    return values


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: np.ndarray) -> np.ndarray:
    top, bottom = (_polynomial(c, x) for c in coefficients)
    top /= bottom
    return top


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    result = x * coefficients[0]
    for c in coefficients[1:-1]:
        result += c
        result *= x
    result += coefficients[-1]
    return result


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive values: exponent times log 2 plus the series of 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, 2 * mantissa, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(tuple(2 / k for k in range(21, 0, -2)), ratio * ratio)
    return series * ratio + (exponent - small) * math.log(2)
