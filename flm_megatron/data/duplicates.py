"""Exact and near duplicates of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy

from flm_megatron.errors import RequestError

SHINGLE_WORDS = 5
PERMUTATIONS = 128
SEED = 1
SCHEME = "affine32"
"""The library's name of the permutations."""


def exact_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Index of each text that occurred before, and of its first copy; spaces and capitals are ignored."""
    first: dict[bytes, int] = {}
    copies: dict[int, int] = {}
    for index, text in enumerate(texts):
        key = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
        if first.setdefault(key, index) != index:
            copies[index] = first[key]
    return copies


def near_duplicates(texts: Sequence[str], similarity: float, seed: int) -> dict[int, int]:
    """Index of each text that is near one kept before it, and of that one. Raises as `NearDuplicates`."""
    kept = NearDuplicates(similarity, seed)
    found = ((index, kept.like(minhash(text, seed), index)) for index, text in enumerate(texts))
    return {index: first for index, first in found if first is not None}


class NearDuplicates:
    """Texts that were kept, to find those near one of them.

    Near means a Jaccard similarity of the sets of runs of five words, as MinHash over 128 permutations estimates it,
    of at least `similarity`. The library's locality-sensitive hashing finds them without comparing all pairs.
    """

    def __init__(self, similarity: float, seed: int = SEED) -> None:
        """None is kept yet.

        Raises:
            RequestError: `similarity` is not between 0 and 1, or the library is not installed.
        """
        if not 0 < similarity <= 1:
            raise RequestError(f"a similarity of {similarity} does not lie above 0 and up to 1")
        self._sketch, self._similarity, self._seed = _datasketch(), similarity, seed
        self._kept = self._sketch.MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
        self._hashes: dict[int, numpy.ndarray] = {}

    def like(self, hashed: numpy.ndarray, number: int) -> int | None:
        """The first text near the one whose `minhash` is given; if there is none, that one is kept as `number`."""
        sketch = self._sketched(hashed)
        candidates = self._kept.query(sketch)
        near = [other for other in candidates if (self._hashes[other] == hashed).mean() >= self._similarity]
        if near:
            return min(near)
        self._insert(number, hashed, sketch)
        return None

    def keep(self, number: int, hashed: numpy.ndarray) -> None:
        """Keep a text that is known to be near none."""
        self._insert(number, hashed, self._sketched(hashed))

    def _sketched(self, hashed: numpy.ndarray) -> Any:
        return self._sketch.MinHash(num_perm=PERMUTATIONS, seed=self._seed, hashvalues=hashed, scheme=SCHEME)

    def _insert(self, number: int, hashed: numpy.ndarray, sketch: Any) -> None:
        self._kept.insert(number, sketch)
        self._hashes[number] = hashed


def minhash(text: str, seed: int = SEED) -> numpy.ndarray:
    """The MinHash of a text: uint64 [permutations]. Raises RequestError if the library is not installed."""
    hashed = _datasketch().MinHash(num_perm=PERMUTATIONS, seed=seed, scheme=SCHEME)
    hashed.update_batch([shingle.encode() for shingle in shingles(text)])
    return numpy.asarray(hashed.hashvalues, numpy.uint64)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise RequestError("near duplicates need datasketch: pip install 'flm_megatron[data]'") from None
    return datasketch


def shingles(text: str) -> set[str]:
    """All runs of five words; the whole text if it is shorter."""
    words = text.lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}
