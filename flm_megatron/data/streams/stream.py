"""The one stream of samples that all stages of a run share.

Which sample has an index depends on the data and the seed, never on a budget, a layout or a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from flm_megatron.config.history import Segment
from flm_megatron.config.rules import names_mistake, shares_mistake
from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.corpus.description import check_same_tokenizer
from flm_megatron.data.corpus.source_line import SourceLine
from flm_megatron.data.streams.blend import Blend
from flm_megatron.data.streams.cuts import Cut
from flm_megatron.data.streams.mixture import Mixture, mixture_at_end, segment_sources
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    import torch

SampleId = tuple[str, int, int]


class SampleStream:
    """Samples of a blend of sources, by index.

    With `weight` on every source (or with nothing: then in proportion to their samples) the stream has no end and
    sources are gone through as often as needed. With `epochs` it ends after `limit_samples`.
    """

    limit_samples: int | None
    """Samples in the stream; none if it has no end."""

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        split: Literal["train", "validation"] = "train",
        mixture: Mixture | None = None,
    ) -> None:
        """Open `data.train`, or all of `data.validation` blended; of a run under way, `mixture` goes on.

        Any number of processes may open the same data at the same time.

        Raises:
            RequestError: there are no sources, or two of one name, or weights and epochs do not go together, or
                a dataset is missing, too small or made with another tokenizer than the others.
            DamagedError: the files of a dataset do not agree with what was written.
        """
        configs = data.train if split == "train" else data.validation
        check_sources(configs, split)
        mixture = mixture or _from_the_beginning(configs, data.sequence_length)
        self.sequence_length = data.sequence_length
        self.first_sample, self._first_token = mixture.first_sample, mixture.first_token
        by_name = {config.display_name: config for config in configs}
        configs = [by_name[mixed.source.name] for mixed in mixture.sources]
        self._lines = [
            SourceLine(config, mixed.place, mixed.cuts, seed, data.cache)
            for config, mixed in zip(configs, mixture.sources, strict=True)
        ]
        self.sources = [line.source for line in self._lines]
        check_same_tokenizer(configs, [source.description for source in self.sources])
        self.limit_samples = mixture.limit_samples
        self._is_remote = any(source.is_remote for source in self.sources)
        self._blend = Blend(mixture.weights)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, each [sequence].

        Raises:
            RequestError: the stream ends before it.
        """
        line, cut, sample = self._locate(index)
        return line.read(cut, sample)

    def sample_ids(self, index: int) -> SampleId:
        """(source name, epoch, sample in the source) of sample `index`."""
        line, cut, sample = self._locate(index)
        return line.name, cut.epoch, sample

    def names(self, index: int) -> list[str]:
        """Names of sample `index` in logs and in `flm data show`: SOURCE/EPOCH/SAMPLE."""
        line, cut, sample = self._locate(index)
        return [f"{line.name}/{cut.label}/{sample}"]

    def ids(self, name: str) -> list[int]:
        """Token ids of the sample with that name in `names`.

        Raises:
            RequestError: there is no such source or sample.
        """
        source_name, label, sample = name.rsplit("/", 2) if name.count("/") >= 2 else (name, "", "")
        line = next((line for line in self._lines if line.name == source_name), None)
        cut = line.cut_named(label) if line else None
        if line is None or cut is None or not (sample.isdigit() and int(sample) < cut.samples(line.total)):
            known = ", ".join(f"{line.name}/EPOCH/0 to {len(line.source) - 1}" for line in self._lines)
            raise RequestError(f"there is no sample {name!r}: names are {known}")
        item = line.read(cut, int(sample))
        count = int(item["loss_mask"].sum())
        return [*item["tokens"][:count].tolist(), int(item["labels"][count - 1])]

    def spans(self, index: int) -> tuple[str, list[tuple[int, int]]]:
        """Source name of sample `index`, and the range of its ids on the line of documents: [start, stop)."""
        line, cut, sample = self._locate(index)
        return line.name, line.spans(cut, sample)

    def documents(self, index: int) -> tuple[str, list[int]]:
        """Name of the source of sample `index`, and the numbers of the documents it takes text from."""
        line, cut, sample = self._locate(index)
        spans = line.spans(cut, sample)
        return line.name, [n for start, stop in spans for n in line.source.documents(start, stop - start + 1)]

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over each source in the `samples` samples from the first on, by name."""
        counts = self._blend.counts(samples)
        return {source.name: count / len(source) for source, count in zip(self.sources, counts, strict=True)}

    def check_budget(self, samples: int) -> None:
        """Check that the stream has `samples` samples.

        Raises:
            RequestError: it ends before; says how many tokens there are.
        """
        if self.limit_samples is not None and samples > self.limit_samples:
            have, want = (
                self._first_token + (count - self.first_sample) * self.sequence_length
                for count in (self.limit_samples, samples)
            )
            raise RequestError(
                f"the data ends after {have:,} tokens ({self.limit_samples:,} samples of {self.sequence_length}), but"
                f" {want:,} are asked for ({samples:,} samples): shorten the budget, raise epochs, or give weights"
            )

    def want(self, indices: Iterable[int]) -> None:
        """Have the samples at `indices` brought here in the background, where they lie in a store.

        Those beyond the end of the stream are left out.
        """
        for index in indices if self._is_remote else ():
            if self.limit_samples is None or index < self.limit_samples:
                line, cut, sample = self._locate(index)
                if line.source.is_remote:
                    line.want(cut, sample)

    def _locate(self, index: int) -> tuple[SourceLine, Cut, int]:
        assert index >= self.first_sample
        self.check_budget(index + 1)
        number, draw = self._blend[index - self.first_sample]
        line = self._lines[number]
        return line, *line.locate(draw)


def validation_streams(data: DataConfig, seed: int) -> dict[str, SampleStream]:
    """One stream for each validation source by name, in the order of the run file; each is one pass over its text.

    Raises:
        RequestError, DamagedError: as SampleStream.
    """
    check_names(data.validation, "validation")
    alone = [SourceConfig(path=source.path, name=source.name, epochs=1.0) for source in data.validation]
    return {
        source.display_name: SampleStream(
            DataConfig(data.sequence_length, validation=[source], cache=data.cache), seed, "validation"
        )
        for source in alone
    }


def check_sources(configs: list[SourceConfig], split: str) -> None:
    """Raise RequestError if there are no sources, two of one name, or weights and epochs that do not go together."""
    if not configs:
        raise RequestError(f"data.{split} has no sources: give each a path")
    if mistake := shares_mistake(configs, f"data.{split}"):
        raise RequestError(mistake)
    check_names(configs, split)


def check_names(configs: Sequence[SourceConfig], split: str) -> None:
    """Raise RequestError if two sources bear one name."""
    if mistake := names_mistake(configs, f"data.{split}"):
        raise RequestError(mistake)


def _from_the_beginning(configs: Sequence[SourceConfig], length: int) -> Mixture:
    return mixture_at_end([Segment("", 0, 0, 0, 1, length, segment_sources(configs))])
