"""A stream whose batch, sequence length and mixture change on the way: every token once, none skipped, in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_megatron.config.history import History, Segment
from flm_megatron.config.schema import DataConfig
from flm_megatron.data.corpus.source_line import Remaining
from flm_megatron.data.streams.cuts import Cut, Place
from flm_megatron.data.streams.mixture import mixture_at_end, segment_sources
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.errors import RequestError
from tests.support import data_cases

SEED = 5
SETS = {"web": 9, "code": 5, "books": 7}
Weights = dict[str, float]
Lines = dict[str, numpy.ndarray]
Change = tuple[int, int, int, Weights]
"""Steps, batch, length, weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small datasets."""
    path = tmp_path_factory.mktemp("sets")
    data_cases.datasets(path, SETS)
    return path


@pytest.fixture(scope="module")
def lines(folder: Path) -> Lines:
    """The ids of every dataset, its documents in the order that numpy's generator gives them for the seed."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = {}
    for name in SETS:
        documents = IndexedDataset(str(folder / name))
        order = numpy.arange(len(documents))
        numpy.random.RandomState(SEED).shuffle(order)
        found[name] = numpy.concatenate([documents[int(number)] for number in order])
    return found


def config(folder: Path, length: int, weights: Weights, field: str = "weight") -> DataConfig:
    """Data of a run."""
    sources = data_cases.sources(folder, weights, epochs=field == "epochs")
    return DataConfig(sequence_length=length, train=sources)


def history_of(folder: Path, changes: Sequence[Change], field: str = "weight") -> History:
    """Segments of one stage, one after the other."""
    segments: list[Segment] = []
    step = sample = token = 0
    for steps, batch, length, weights in changes:
        sources = segment_sources(config(folder, length, weights, field).train)
        segments.append(Segment("s", step, sample, token, batch, length, sources))
        step, sample, token = step + steps, sample + steps * batch, token + steps * batch * length
    return tuple(segments)


def streams(folder: Path, changes: Sequence[Change], field: str = "weight") -> list[SampleStream]:
    """The stream of every segment, each as a run that resumed there would open it."""
    history = history_of(folder, changes, field)
    return [
        SampleStream(config(folder, length, weights, field), SEED, mixture=mixture_at_end(history[: number + 1]))
        for number, (_, _, length, weights) in enumerate(changes)
    ]


def taken(folder: Path, changes: Sequence[Change], field: str = "weight") -> list[tuple[SampleStream, int]]:
    """(stream, index) of every sample of a run that goes through `changes`."""
    segments, opened = history_of(folder, changes, field), streams(folder, changes, field)
    return [
        (stream, segment.first_sample + number)
        for stream, segment, (steps, batch, _, _) in zip(opened, segments, changes, strict=True)
        for number in range(steps * batch)
    ]


def check_each_token_once(samples: Sequence[tuple[SampleStream, int]], lines: Lines) -> None:
    """Every trained id stands where the sample says, with the id after it as label; none is trained on again before
    every other one of its source was; a pass that is followed by another has all that its lengths can take."""
    passes: dict[str, list[list[tuple[int, int]]]] = defaultdict(lambda: [[]])
    labels: dict[str, int] = {}
    for stream, index in samples:
        item, (name, spans) = stream[index], stream.spans(index)
        label = stream.names(index)[0].split("/")[1].split(".")[0]
        if labels.setdefault(name, int(label)) != int(label):
            assert int(label) == labels[name] + 1
            labels[name] = int(label)
            passes[name].append([])
        passes[name][-1] += spans
        places = numpy.concatenate([numpy.arange(start, stop) for start, stop in spans])
        count = len(places)
        assert 0 < count <= stream.sequence_length
        assert item["loss_mask"].tolist() == [1.0] * count + [0.0] * (stream.sequence_length - count)
        assert item["tokens"][:count].tolist() == lines[name][places].tolist()
        assert item["labels"][:count].tolist() == lines[name][places + 1].tolist()
        assert item["position_ids"].tolist() == list(range(stream.sequence_length))
    for name, all_spans in passes.items():
        for number, spans in enumerate(all_spans):
            places = numpy.concatenate([numpy.arange(start, stop) for start, stop in spans])
            assert len(places) == len(set(places.tolist()))
            if number < len(all_spans) - 1:
                assert sorted(places.tolist()) == list(range(len(places)))
                assert len(lines[name]) - 32 <= len(places) + 1 <= len(lines[name])


MIXED: list[Change] = [
    (3, 4, 16, {"web": 0.5, "code": 0.5}),
    (4, 8, 16, {"web": 0.5, "code": 0.5}),
    (5, 3, 32, {"web": 0.5, "code": 0.5}),
    (2, 5, 32, {"books": 0.7, "web": 0.3}),
    (9, 4, 24, {"books": 0.7, "web": 0.3}),
    (40, 2, 8, {"books": 1.0, "code": 2.0, "web": 1.0}),
    (30, 3, 16, {"web": 1.0}),
]


def test_every_token_once_over_many_changes(folder: Path, lines: Lines) -> None:
    """Batch, length, a source that comes, one that stops and comes back, over several passes."""
    samples = taken(folder, MIXED)
    check_each_token_once(samples, lines)
    assert {stream.names(index)[0].split("/")[1] for stream, index in samples} >= {"0", "0.1", "0.2", "1"}


weights = st.dictionaries(st.sampled_from(sorted(SETS)), st.sampled_from([0.2, 1.0, 3.0]), min_size=1)
changes = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 6), st.sampled_from([8, 12, 16, 32]), weights), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=changes)
def test_every_token_once_over_any_history(folder: Path, lines: Lines, changes: list[Change]) -> None:
    """Any changes of batch, length and mixture, one after the other."""
    check_each_token_once(taken(folder, changes), lines)


def test_another_batch_changes_no_sample(folder: Path) -> None:
    """The stream is the one of a run whose batch never changed, sample by sample."""
    parts = {"web": 0.6, "code": 0.4}
    whole = streams(folder, [(1, 1, 16, parts)])[0]
    for stream, index in taken(folder, [(5, 4, 16, parts), (3, 8, 16, parts), (7, 1, 16, parts)]):
        assert stream.names(index) == whole.names(index)
        assert all(torch.equal(stream[index][field], value) for field, value in whole[index].items())


def test_another_mixture_goes_on_with_every_source_where_it_stood(folder: Path) -> None:
    """Each source's samples are, in order, those that it gives alone; shares are the new weights from the change on."""
    parts: list[Change] = [
        (10, 4, 16, {"web": 0.75, "code": 0.25}),
        (10, 4, 16, {"web": 0.25, "books": 0.75}),
        (10, 4, 16, {"web": 0.5, "code": 0.5}),
    ]
    names = [stream.names(index)[0] for stream, index in taken(folder, parts)]
    for name in SETS:
        mine = [one for one in names if one.startswith(name)]
        alone = streams(folder, [(1, 1, 16, {name: 1.0})])[0]
        assert mine == [alone.names(index)[0] for index in range(len(mine))]
    counts = [[sum(one.startswith(name) for one in names[k : k + 40]) for name in SETS] for k in (0, 40, 80)]
    assert counts == [[30, 10, 0], [10, 0, 30], [20, 20, 0]]


def test_the_rest_of_a_pass_keeps_text_together(folder: Path) -> None:
    """Early in a pass most of what is left is one stretch: new samples are not made of old ones."""
    samples = taken(folder, [(1, 3, 8, {"web": 1.0}), (10, 1, 32, {"web": 1.0})])[3:]
    stretches = [len(stream.spans(index)[1]) for stream, index in samples]
    assert stretches.count(1) >= 6 and max(stretches) <= 3


def test_a_length_that_comes_back_before_anything_was_taken_leaves_no_trace(folder: Path) -> None:
    """Two changes at one place that undo each other."""
    parts = {"web": 1.0}
    one = taken(folder, [(2, 3, 16, parts), (0, 3, 32, parts), (4, 3, 16, parts)])
    other = taken(folder, [(6, 3, 16, parts)])
    assert [stream.names(index) for stream, index in one] == [stream.names(index) for stream, index in other]


def test_samples_of_every_pass_and_cut_are_found_by_name(folder: Path) -> None:
    """What the log called a sample is the same text to a run that went on since."""
    samples = taken(folder, MIXED)
    last = samples[-1][0]
    for stream, index in samples:
        (name,) = stream.names(index)
        if name.startswith("web/"):
            item = stream[index]
            count = int(item["loss_mask"].sum())
            assert last.ids(name) == [*item["tokens"][:count].tolist(), int(item["labels"][count - 1])]


def test_epochs_count_what_was_taken_already(folder: Path) -> None:
    """More passes, a new source and one that stops: each is taken to its number of passes, then the stream ends."""
    first = {"web": 2.0, "code": 1.0}
    size = {name: len(streams(folder, [(1, 1, 16, {name: 1.0})])[0].sources[0]) for name in SETS}
    then: list[Change] = [(5, 4, 16, first), (3, 4, 16, {"web": 3.0, "books": 0.5})]
    stream = streams(folder, then, "epochs")[1]
    done = [s.names(i)[0] for s, i in taken(folder, then[:1], "epochs")]
    assert stream.limit_samples is not None
    names = done + [stream.names(index)[0] for index in range(20, stream.limit_samples)]
    web = [name for name in names if name.startswith("web/")]
    assert len(web) == len(set(web)) == 3 * size["web"]
    assert sum(name.startswith("books/") for name in names) == round(0.5 * size["books"])
    assert stream.limit_samples == len(names)


def test_part_of_an_epoch_counts_what_was_taken_already(folder: Path) -> None:
    """One and a half passes in all, though another source changes on the way."""
    then: list[Change] = [(5, 4, 16, {"web": 1.5, "code": 1.0}), (3, 4, 16, {"web": 1.5, "books": 0.5})]
    first, last = streams(folder, then, "epochs")
    assert last.limit_samples is not None
    names = [first.names(index)[0] for index in range(20)]
    names += [last.names(index)[0] for index in range(20, last.limit_samples)]
    assert sum(name.startswith("web/") for name in names) == round(1.5 * len(first.sources[0]))


@given(total=st.integers(2, 60), length=st.integers(1, 9), epoch=st.integers(0, 5), steps=st.integers(0, 50))
def test_places_go_from_pass_to_pass(total: int, length: int, epoch: int, steps: int) -> None:
    """Counted one by one; the last id of a source is only a label."""
    samples = len(range(length, total, length))
    assert Cut(epoch, length).samples(total) == samples
    if samples:
        place = Place(Cut(epoch, length)).after(steps, total)
        assert (place.cut.epoch, place.taken) == (epoch + steps // samples, steps % samples)
        assert place.after(7, total) == Place(Cut(epoch, length)).after(steps + 7, total)


def test_whole_epochs_are_exact_over_lengths_too(folder: Path, lines: Lines) -> None:
    """Three passes over one source and one over another, with the length changed twice: then the stream ends."""
    parts = {"web": 3.0, "code": 1.0}
    changes = [(7, 4, 16, parts), (5, 2, 32, parts), (1, 1, 12, parts)]
    last = streams(folder, changes, "epochs")[-1]
    assert last.limit_samples is not None
    samples = taken(folder, changes[:2], "epochs")
    samples += [(last, index) for index in range(38, last.limit_samples)]
    check_each_token_once(samples, lines)
    trained = Counter[str]()
    for stream, index in samples:
        name, spans = stream.spans(index)
        trained[name] += sum(stop - start for start, stop in spans)
    for name, passes in parts.items():
        size = len(lines[name]) - 1
        assert passes * (size - 32) < trained[name] <= passes * size
    with pytest.raises(RequestError, match="the data ends after"):
        last[last.limit_samples]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 200_000), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_remains_is_found_by_its_number(size: int, share: float, seed: int) -> None:
    """Against an array of all that is left, over several blocks of bits."""
    numbers = numpy.random.RandomState(seed).permutation(size)
    taken, left = numpy.split(numbers, [int(share * size)])
    remaining = Remaining(size, numpy.array_split(taken, 3))
    assert len(remaining) == len(left)
    for index in {0, len(left) // 3, len(left) - 1} if len(left) else ():
        assert remaining[index] == numpy.sort(left)[index]
