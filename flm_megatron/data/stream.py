"""The one stream of samples that all stages of a run go along.

Which sample stands at an index depends on the data and the seed, never on a budget, a layout or a stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.blend import Blend
from flm_megatron.data.description import check_same_tokenizer
from flm_megatron.data.source import Source
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

    def __init__(self, data: DataConfig, seed: int, split: Literal["train", "validation"] = "train") -> None:
        """Open `data.train`, or all of `data.validation` blended.

        Any number of processes may open the same data at the same time.

        Raises:
            RequestError: there are no sources, or two of one name, or weights and epochs do not go together, or
                a dataset is missing, too small or made with another tokenizer than the others.
            DamagedError: the files of a dataset do not agree with what was written.
        """
        configs = data.train if split == "train" else data.validation
        _check_sources(configs, split)
        self.sequence_length = data.sequence_length
        self.sources = [Source(config, data.sequence_length, seed, data.cache) for config in configs]
        check_same_tokenizer(configs, [source.description for source in self.sources])
        check_names([source.name for source in self.sources])
        weights = _weights(configs, [len(source) for source in self.sources])
        self.limit_samples = int(sum(weights)) if configs[0].epochs is not None else None
        self._blend = Blend(weights)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, each [sequence].

        Raises:
            RequestError: the stream ends before it.
        """
        source, _, sample = self._locate(index)
        return source.read(sample)

    def sample_ids(self, index: int) -> SampleId:
        """(source name, epoch, sample in the source) of sample `index`."""
        source, epoch, sample = self._locate(index)
        return source.name, epoch, sample

    def names(self, index: int) -> list[str]:
        """What sample `index` is called in logs, and by `flm data show`: SOURCE/EPOCH/SAMPLE."""
        return ["/".join(map(str, self.sample_ids(index)))]

    def ids(self, name: str) -> list[int]:
        """Token ids of the sample that `names` calls so.

        Raises:
            RequestError: there is no such source or sample.
        """
        source_name, _, sample = name.rsplit("/", 2) if name.count("/") >= 2 else (name, "", "")
        sources = {source.name: source for source in self.sources}
        source = sources.get(source_name)
        if source is None or not (sample.isdigit() and int(sample) < len(source)):
            known = ", ".join(f"{name}/EPOCH/0 to {len(source) - 1}" for name, source in sources.items())
            raise RequestError(f"there is no sample {name!r}: names are {known}")
        item = source.read(int(sample))
        return [*item["tokens"].tolist(), int(item["labels"][-1])]

    def documents(self, index: int) -> tuple[str, list[int]]:
        """Name of the source of sample `index`, and the numbers of the documents it takes text from."""
        source, _, sample = self._locate(index)
        return source.name, source.documents(sample)

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over each source in the first `samples` samples, by name."""
        counts = self._blend.counts(samples)
        return {source.name: count / len(source) for source, count in zip(self.sources, counts, strict=True)}

    def check_budget(self, samples: int) -> None:
        """Check that the stream has `samples` samples.

        Raises:
            RequestError: it ends before; says how many tokens there are.
        """
        if self.limit_samples is not None and samples > self.limit_samples:
            have, want = (count * self.sequence_length for count in (self.limit_samples, samples))
            raise RequestError(
                f"the data ends after {have:,} tokens ({self.limit_samples:,} samples of {self.sequence_length}), but"
                f" {want:,} are asked for ({samples:,} samples): shorten the budget, raise epochs, or give weights"
            )

    def _locate(self, index: int) -> tuple[Source, int, int]:
        assert index >= 0
        self.check_budget(index + 1)
        number, draw = self._blend[index]
        source = self.sources[number]
        return source, *source.sample_id(draw)


def validation_streams(data: DataConfig, seed: int) -> dict[str, SampleStream]:
    """One stream for each validation source by name, in the order of the run file; each is one pass over its text.

    Raises:
        RequestError, DamagedError: as SampleStream.
    """
    alone = [SourceConfig(path=source.path, name=source.name, epochs=1.0) for source in data.validation]
    streams = [
        SampleStream(DataConfig(data.sequence_length, validation=[source], cache=data.cache), seed, "validation")
        for source in alone
    ]
    names = [stream.sources[0].name for stream in streams]
    check_names(names)
    return dict(zip(names, streams, strict=True))


def _check_sources(configs: list[SourceConfig], split: str) -> None:
    if not configs:
        raise RequestError(f"data.{split} has no sources: give each a path")
    for field in ("weight", "epochs"):
        given = [getattr(config, field) for config in configs]
        if any(value is not None for value in given):
            if None in given:
                raise RequestError(f"data.{split}: {field} is {given}: give it to every source or to none")
            if min(given) <= 0:
                raise RequestError(f"data.{split}: {field} is {given}: each has to be above 0")
    if configs[0].weight is not None and configs[0].epochs is not None:
        raise RequestError(f"data.{split} has both weight and epochs: give one of the two")


def check_names(names: list[str]) -> None:
    """Raise RequestError if two sources bear one name."""
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two data sources are named {name!r}: give each a name of its own")


def _weights(configs: list[SourceConfig], sizes: list[int]) -> list[float]:
    """Weights of the blend: given, or the samples to be taken from each source."""
    weights = [config.weight for config in configs if config.weight is not None]
    passes = [1.0 if config.epochs is None else config.epochs for config in configs]
    return weights or [max(1, round(count * size)) for count, size in zip(passes, sizes, strict=True)]
