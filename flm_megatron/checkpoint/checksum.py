"""CRC-32 of two pieces of data from the CRC-32 of each, so that no byte is read twice."""

from __future__ import annotations

from functools import lru_cache

POLYNOMIAL = 0xEDB88320
ONE = 1 << 31  # polynomials modulo POLYNOMIAL, lowest power in the highest bit


def combine_crc32(first: int, second: int, second_length: int) -> int:
    """CRC-32 of data whose beginning has CRC-32 `first` and whose other `second_length` bytes have `second`.

    The method is zlib's `crc32_combine`: multiply by x^(8 n) modulo the polynomial.
    """
    return _times(_power_of_x(8 * second_length), first) ^ second


@lru_cache(maxsize=1024)
def _power_of_x(exponent: int) -> int:
    result, square = ONE, ONE >> 1
    while exponent:
        if exponent & 1:
            result = _times(square, result)
        square = _times(square, square)
        exponent >>= 1
    return result


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (POLYNOMIAL if b & 1 else 0)
    return product
