"""Which conversations share a sample."""

from __future__ import annotations

from collections.abc import Sequence

OPEN_SAMPLES = 32


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in samples of at most `capacity`, each index once.

    Each goes, in the order given, into the first of the open samples that has room (at most 32 are open: the oldest
    closes when another is needed), so that samples stay near the order of the epoch. No length is above `capacity`.
    """
    samples: list[list[int]] = []
    room: dict[int, int] = {}
    for index, length in enumerate(lengths):
        assert length <= capacity
        chosen = next((sample for sample, left in room.items() if left >= length), None)
        if chosen is None:
            if len(room) == OPEN_SAMPLES:
                del room[next(iter(room))]
            chosen = len(samples)
            samples.append([])
            room[chosen] = capacity
        samples[chosen].append(index)
        room[chosen] -= length
        if not room[chosen]:
            del room[chosen]
    return samples
