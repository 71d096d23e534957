"""The samples of one source from its current position on, in the order in which they are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy

from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus.description import member
from flm_megatron.data.corpus.source import Source
from flm_megatron.data.streams.cuts import Cut, Place
from flm_megatron.data.streams.permutation import Permutation
from flm_megatron.errors import DamagedError

if TYPE_CHECKING:
    import torch

MANY = 1 << 20
REMAINING_BLOCK = 65536


class SourceLine:
    """A source that continues from `place`: sample after sample, pass after pass, all of one length."""

    def __init__(self, config: SourceConfig, place: Place, cuts: Sequence[Cut], seed: int, cache: str | None) -> None:
        """`cuts` says how the source was cut whenever that changed, and now. Raises as `Source`."""
        self.source = Source(config, place.cut.length, seed, cache)
        self.place, self._cuts = place, cuts
        self.name, self.total = self.source.name, self.source.description.tokens
        self._config, self._seed, self._cache = config, seed, cache
        self._order = lru_cache(maxsize=4)(self._order_of)
        self._left = lru_cache(maxsize=4)(self._left_by_parent)
        self._source_at = lru_cache(maxsize=None)(self._source_of_length)

    def locate(self, draw: int) -> tuple[Cut, int]:
        """The cut of the `draw`-th sample from here on, and its index in the cut."""
        place = self.place.after(draw, self.total)
        return place.cut, self._sample(place.cut, place.taken)

    def cut_named(self, label: str) -> Cut | None:
        """The cut with that label in sample names; none if there is no such pass."""
        known = {cut.label: cut for last in self._cuts for cut in _with_parents(last)}
        if label in known or not label.isdigit():
            return known.get(label)
        lengths = [cut.length for cut in self._cuts if cut.epoch < int(label)]
        return Cut(int(label), lengths[-1]) if lengths else None

    def _sample(self, cut: Cut, taken: int) -> int:
        """The sample of a cut that is taken after `taken` others. One with less text than the others is the last."""
        full = cut.tokens(self.total) // cut.length
        return self._order(cut)[taken] if taken < full else full

    def read(self, cut: Cut, sample: int) -> dict[str, torch.Tensor]:
        """Sample `sample` of a cut: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, [sequence].

        What a shorter last one lacks is id 0 and trains nothing.

        Raises:
            DamagedError: it holds ids that its vocabulary does not have.
        """
        item = self._joined(cut, sample) if cut.parent else self._source_at(cut.length).read(sample)
        for ids in (item["tokens"], item["labels"]):
            lowest, highest = map(int, ids.aminmax())
            if lowest < 0 or highest >= self.source.description.vocab_size:
                raise self._damaged(cut, sample, lowest if lowest < 0 else highest)
        return item

    def _damaged(self, cut: Cut, sample: int, found: int) -> DamagedError:
        path, known = self._config.path, self.source.description.vocab_size
        return DamagedError(
            f"{member(path, 'bin')}: sample {self.name}/{cut.label}/{sample} holds the id {found}, and its tokenizer "
            f"has {known}: damaged; bring it back, or build it again (`flm data verify {path}` reads all of it)"
        )

    def _joined(self, cut: Cut, sample: int) -> dict[str, torch.Tensor]:
        """A sample made of what earlier cuts left over, from stretches of the source's line."""
        import torch

        ids = [self.source.text(start, stop - start + 1) for start, stop in self.spans(cut, sample)]
        count = sum(len(part) - 1 for part in ids)
        tokens, labels = torch.zeros(2, cut.length, dtype=torch.long).unbind()
        tokens[:count] = torch.from_numpy(numpy.concatenate([part[:-1] for part in ids]))
        labels[:count] = torch.from_numpy(numpy.concatenate([part[1:] for part in ids]))
        mask = (torch.arange(cut.length) < count).float()
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": torch.arange(cut.length)}

    def want(self, cut: Cut, sample: int) -> None:
        """Have the ids of a sample of a dataset in a store brought here, in the background."""
        for start, stop in self.spans(cut, sample):
            self.source.want(start, stop - start + 1)

    def spans(self, cut: Cut, sample: int) -> list[tuple[int, int]]:
        """The ranges of a sample's ids on the source's line: [start, stop) of each stretch, in order."""
        row = sample if cut.parent else self._source_at(cut.length).row(sample)
        stop = min((row + 1) * cut.length, cut.tokens(self.total))
        joined: list[tuple[int, int]] = []
        for start, end in self._spans(cut, row * cut.length, stop):
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, end))
        return joined

    def _spans(self, cut: Cut, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Stretches of the source's line that make [start, stop) of the line that `cut` cuts."""
        if cut.parent is None:
            yield start, stop
            return
        left, length = self._left(cut), cut.parent.length
        while start < stop:
            index, offset = divmod(start, length)
            count = min(length - offset, stop - start)
            at = left[index] * length + offset
            yield from self._spans(cut.parent, at, at + count)
            start += count

    def _left_by_parent(self, cut: Cut) -> Remaining:
        """Samples of a cut's parent that it is made of, by their place on the parent's line."""
        parent = cut.parent
        assert parent is not None
        order = self._order(parent)
        steps = (order.places(start, min(start + MANY, cut.taken)) for start in range(0, cut.taken, MANY))
        rows = steps if parent.parent else map(self._source_at(parent.length).rows, steps)
        return Remaining(parent.samples(self.total), rows)

    def _order_of(self, cut: Cut) -> Permutation:
        return Permutation(cut.tokens(self.total) // cut.length, f"{self._seed}/{self.name}/{cut.label}")

    def _source_of_length(self, length: int) -> Source:
        if length == self.source.sequence_length:
            return self.source
        return Source(self._config, length, self._seed, self._cache)


def _with_parents(cut: Cut) -> list[Cut]:
    return [cut] if cut.parent is None else [*_with_parents(cut.parent), cut]


class Remaining:
    """Numbers of range(size) that are not among `taken`, in order: the k-th of them, from one bit for each."""

    def __init__(self, size: int, taken: Iterable[numpy.ndarray]) -> None:
        """`taken` gives numbers in arrays, of any lengths."""
        left = numpy.zeros(-(-size // REMAINING_BLOCK) * REMAINING_BLOCK, dtype=bool)
        left[:size] = True
        for numbers in taken:
            left[numbers] = False
        counts = left.reshape(-1, REMAINING_BLOCK).sum(axis=1)
        self._before = numpy.concatenate([[0], numpy.cumsum(counts)])
        self._bits = numpy.packbits(left).reshape(-1, REMAINING_BLOCK // 8)
        self._block = lru_cache(maxsize=4)(self._numbers)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, index: int) -> int:
        """The number that has `index` others before it."""
        assert 0 <= index < len(self)
        block = int(numpy.searchsorted(self._before, index, side="right")) - 1
        return int(self._block(block)[index - self._before[block]])

    def _numbers(self, block: int) -> numpy.ndarray:
        return numpy.flatnonzero(numpy.unpackbits(self._bits[block])) + block * REMAINING_BLOCK
