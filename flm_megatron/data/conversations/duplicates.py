"""Exact and near duplicates of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from flm_megatron.errors import RequestError

SHINGLE_WORDS = 5
PERMUTATIONS = 128


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
    """Index of each text that is near one kept before it, and of that one.

    Near means a Jaccard similarity of the sets of runs of five words, as MinHash over 128 permutations estimates it,
    of at least `similarity`. The library's locality-sensitive hashing finds them without comparing all pairs.

    Raises:
        RequestError: `similarity` is not between 0 and 1, or the library is not installed.
    """
    if not 0 < similarity <= 1:
        raise RequestError(f"a similarity of {similarity} does not lie above 0 and up to 1")
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise RequestError("near duplicates are found by datasketch, which is not installed: install it") from None
    kept = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
    hashes: dict[int, MinHash] = {}
    copies: dict[int, int] = {}
    for index, text in enumerate(texts):
        hashed = MinHash(num_perm=PERMUTATIONS, seed=seed)
        hashed.update_batch([shingle.encode() for shingle in shingles(text)])
        near = [other for other in kept.query(hashed) if hashes[other].jaccard(hashed) >= similarity]
        if near:
            copies[index] = min(near)
        else:
            kept.insert(index, hashed)
            hashes[index] = hashed
    return copies


def shingles(text: str) -> set[str]:
    """All runs of five words; the whole text if it is shorter."""
    words = text.lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}
