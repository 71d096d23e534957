"""The mixture of a run's sample stream from some sample on: each source's share and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flm_megatron.config.history import Segment, SegmentSource
from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.streams.blend import Blend
from flm_megatron.data.streams.cuts import Cut, Place
from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture.

    Its share of the samples, its position when the mixture begins, and how it was cut at the beginning of this and
    earlier mixtures.
    """

    source: SegmentSource
    weight: float
    place: Place
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Mixture:
    """Sources blended from sample `first_sample` of the run on; with epochs their weights are counts of samples."""

    first_sample: int
    first_token: int
    sources: tuple[MixedSource, ...]

    @property
    def weights(self) -> list[float]:
        """Weights of the sources."""
        return [mixed.weight for mixed in self.sources]

    @property
    def limit_samples(self) -> int | None:
        """Samples of the run up to its end; none if it has no end."""
        counted = self.sources and self.sources[0].source.epochs is not None
        return self.first_sample + int(sum(self.weights)) if counted else None


def mixture_at_end(history: Sequence[Segment]) -> Mixture:
    """The mixture of the last segment, with every source at the position where earlier segments left it.

    A mixture lasts over all consecutive segments that have it; each continues its sources from their positions, also
    after a time in which they were left out.

    Raises:
        RequestError: with epochs, a source was taken more often than is asked for, or none has anything left.
    """
    starts = [history[0], *(after for before, after in pairwise(history) if before.mixture != after.mixture)]
    state: dict[str, _State] = {}
    mixture = _mixture(starts[0], state)
    for following in starts[1:]:
        counts = Blend(mixture.weights).counts(following.first_sample - mixture.first_sample)
        for mixed, count in zip(mixture.sources, counts, strict=True):
            if mixed.source.tokens is not None:
                state[mixed.source.name] = _after(mixed, count, state.get(mixed.source.name))
        mixture = _mixture(following, state)
    return mixture


@dataclass(frozen=True)
class _State:
    """A source between two mixtures: its position, samples taken so far, how it was cut when each one began."""

    place: Place
    taken: int
    cuts: tuple[Cut, ...]


def _after(mixed: MixedSource, count: int, before: _State | None) -> _State:
    """The source after `count` samples of a mixture."""
    taken = before.taken if before else 0
    return _State(mixed.place.after(count, source_tokens(mixed.source)), taken + count, mixed.cuts)


def _mixture(segment: Segment, state: Mapping[str, _State]) -> Mixture:
    length = segment.sequence_length
    fresh = _State(Place(Cut(0, length)), 0, ())
    mixed = []
    for source in segment.sources:
        stands = state.get(source.name, fresh)
        place = stands.place.cut_at(length)
        cuts = (*stands.cuts, place.cut)
        weight = _weight(source, place, cuts, stands.taken)
        if weight > 0:
            mixed.append(MixedSource(source, weight, place, cuts))
    if segment.sources and not mixed:
        raise RequestError("every source was taken as often as data.train says: raise epochs, or add a source")
    return Mixture(segment.first_sample, segment.first_token, tuple(mixed))


def _weight(source: SegmentSource, place: Place, cuts: Sequence[Cut], taken: int) -> float:
    """Weight in the blend: as given, or the samples to be taken from it, less the `taken` ones if these count."""
    if source.weight is not None:
        return source.weight
    size = Cut(0, place.cut.length).samples(source_tokens(source))
    if source.epochs is None:
        return max(1, size)
    left = _samples_left(source, source.epochs, size, place, cuts, taken)
    if left < 0:
        raise RequestError(
            f"source {source.name!r}: {source.epochs:g} epochs are asked for, but more was taken already (pass "
            f"{place.cut.epoch + 1} is under way): give at least so many, or leave it out"
        )
    return left


def _samples_left(
    source: SegmentSource, epochs: float, size: int, place: Place, cuts: Sequence[Cut], taken: int
) -> int:
    """Samples until `epochs` passes over a source, of `size` samples each, are done; below 0 if more are."""
    if epochs == int(epochs):
        rest = place.cut.samples(source_tokens(source)) - place.taken
        return rest + (int(epochs) - place.cut.epoch - 1) * size
    if any(cut.length != place.cut.length for cut in cuts):
        raise RequestError(
            f"source {source.name!r}: {epochs:g} epochs end within a pass, which cannot be counted in samples of more "
            "than one sequence length: give a whole number"
        )
    return max(1, round(epochs * size)) - taken


def source_tokens(source: SegmentSource) -> int:
    """Ids in a source.

    Raises:
        RequestError: they are not known: it comes from an earlier version's checkpoint, and the run file names it no
            more.
    """
    if source.tokens is None:
        raise RequestError(
            f"source {source.name!r} ({source.path}) cannot be left out at once: its size, which the blend so far "
            "depends on, is not in this checkpoint; go on with it until the next one is saved"
        )
    return source.tokens


def segment_sources(configs: Sequence[SourceConfig]) -> tuple[SegmentSource, ...]:
    """The sources of a mixture, with their present datasets.

    Raises:
        RequestError, DamagedError: as `read_description`.
    """
    described = [(config, read_description(config.path)) for config in configs]
    return tuple(
        SegmentSource(config.display_name, config.path, config.weight, config.epochs, found.sha256, found.tokens)
        for config, found in described
    )
