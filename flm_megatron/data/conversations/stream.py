"""The sample stream of a fine-tuning stage: conversations in seeded epochs, packed or padded."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from flm_megatron.data.conversations.packing import pack
from flm_megatron.data.conversations.source import ChatSource, EncodedConversation
from flm_megatron.data.streams.permutation import Permutation
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    import torch

Draw = tuple[int, int]
"""Number of a source, number of a conversation in it."""


class ChatStream:
    """Samples by index, as `data.stream.SampleStream` gives them; beyond the last epoch nothing in them is trained on.

    In each epoch every source is gone through as often as `passes` says, in an order that depends on the seed, the
    epoch and the names of the sources. With `packing` a sample also has `segments`.
    """

    def __init__(
        self,
        sources: Sequence[ChatSource],
        passes: Sequence[float],
        sequence_length: int,
        seed: int,
        epochs: int,
        packing: bool,
        pad: int,
        first_sample: int = 0,
    ) -> None:
        """`pad` fills what is left of a sample; `first_sample` is the index of the first sample."""
        self.sequence_length, self.packing, self.pad = sequence_length, packing, pad
        self.sources, self._passes, self._seed = list(sources), list(passes), seed
        self._first = first_sample
        self._samples = [self._epoch(epoch) for epoch in range(epochs)]
        self._starts = list(accumulate((len(samples) for samples in self._samples), initial=0))
        self.samples = self._starts[-1]
        self.limit_samples: int | None = first_sample + self.samples

    def _epoch(self, epoch: int) -> list[list[Draw]]:
        draws = [
            (number, self._conversation(number, draw))
            for number, (source, passes) in enumerate(zip(self.sources, self._passes, strict=True))
            for draw in range(*(math.floor(at * passes * len(source.conversations)) for at in (epoch, epoch + 1)))
        ]
        if not draws:
            return []
        order = Permutation(len(draws), f"{self._seed}/{'/'.join(source.name for source in self.sources)}/{epoch}")
        draws = [draws[order[place]] for place in range(len(draws))]
        if not self.packing:
            return [[draw] for draw in draws]
        lengths = [self._get(draw).length for draw in draws]
        return [[draws[index] for index in sample] for sample in pack(lengths, self.sequence_length)]

    def _conversation(self, number: int, draw: int) -> int:
        source = self.sources[number]
        epoch, place = divmod(draw, len(source.conversations))
        return Permutation(len(source.conversations), f"{self._seed}/{source.name}/{epoch}")[place]

    def _get(self, draw: Draw) -> EncodedConversation:
        return self.sources[draw[0]].conversations[draw[1]]

    def want(self, indices: Iterable[int]) -> None:
        """Nothing: all conversations are in memory."""

    def _locate(self, index: int) -> tuple[int, list[Draw]]:
        """Epoch and conversations of a sample; none beyond the end."""
        assert index >= self._first
        if index - self._first >= self.samples:
            return len(self._samples), []
        epoch = bisect_right(self._starts, index - self._first) - 1
        return epoch, self._samples[epoch][index - self._first - self._starts[epoch]]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, each [sequence].

        Positions start again with every conversation. With packing `segments` int64 numbers the conversations from
        1 on, 0 is what is left over: attention stays within one number.
        """
        import torch

        length = self.sequence_length
        tokens, labels = torch.full((2, length), self.pad).unbind()
        positions, segments = torch.arange(length), torch.zeros(length, dtype=torch.long)
        mask, start = torch.zeros(length), 0
        for number, draw in enumerate(self._locate(index)[1], 1):
            conversation = self._get(draw)
            here = slice(start, start + conversation.length)
            ids = torch.from_numpy(conversation.ids).long()
            tokens[here], labels[here] = ids[:-1], ids[1:]
            mask[here] = torch.from_numpy(conversation.trained[1:]).float()
            positions[here], segments[here] = torch.arange(conversation.length), number
            start = here.stop
        positions[start:] -= start
        sample = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        return sample | {"segments": segments} if self.packing else sample

    def names(self, index: int) -> list[str]:
        """Names of the conversations of sample `index`: SOURCE/EPOCH/LINE of its file."""
        epoch, draws = self._locate(index)
        return [f"{self.sources[draw[0]].name}/{epoch}/{self._get(draw).line}" for draw in draws]

    def ids(self, name: str) -> list[int]:
        """Token ids of the conversation with that name in `names`. Raises RequestError if there is none."""
        source_name, _, line = name.rsplit("/", 2) if name.count("/") >= 2 else (name, "", "")
        for source in self.sources:
            for conversation in source.conversations:
                if (source.name, str(conversation.line)) == (source_name, line):
                    return conversation.ids.tolist()
        known = ", ".join(f"{source.name}/EPOCH/LINE" for source in self.sources)
        raise RequestError(f"there is no conversation {name!r}: names are {known}")

    def check_budget(self, samples: int) -> None:
        """Accepts any number of samples: those beyond the last epoch train nothing."""
