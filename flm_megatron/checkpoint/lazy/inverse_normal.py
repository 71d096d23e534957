"""Inverse of the normal distribution function in plain IEEE arithmetic."""

from __future__ import annotations

import math

import numpy as np

SPLIT = 0.425  # |p - 1/2| up to which the central approximation holds

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


def inverse_normal(centred: np.ndarray) -> np.ndarray:
    """z with Phi(z) = 1/2 + `centred`, for |z| up to 6; float64 in and out, of the same shape (one axis).

    Only additions, multiplications, divisions and square roots are used, so the bits are the same everywhere.
    """
    inside = SPLIT * SPLIT - centred * centred
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
