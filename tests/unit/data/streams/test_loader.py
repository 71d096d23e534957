"""Micro-batches: the same samples for every layout, from the very next one on, read by a thread that ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch

from flm_megatron.data.streams.loader import Batch, batches, validation_batches
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.errors import RequestError
from tests.support import data_cases

GLOBAL = 8


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> SampleStream:
    """A stream of two sources, without end."""
    folder = tmp_path_factory.mktemp("sets")
    data_cases.datasets(folder, {"web": 20, "code": 10})
    return SampleStream(data_cases.config(folder, {"web": 0.6, "code": 0.4}), seed=2)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def _joined(parts: list[Batch]) -> Batch:
    return {field: torch.cat([part[field] for part in parts]) for field in parts[0]}


def _steps(stream: SampleStream, start: int, micro: int, size: int, steps: int) -> list[Batch]:
    """The global batch of each step, put together from all ranks in order."""
    ranks = []
    for rank in range(size):
        with_thread = batches(stream, start, GLOBAL, micro, rank, size)
        ranks.append(list(islice(with_thread, steps)))
        with_thread.close()
    assert {part["tokens"].shape for rank in ranks for step in rank for part in step} == {(micro, 32)}
    return [_joined([part for rank in ranks for part in rank[step]]) for step in range(steps)]


@pytest.mark.parametrize(("micro", "size"), [(8, 1), (1, 1), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)])
def test_every_layout_takes_exactly_the_next_samples(stream: SampleStream, micro: int, size: int) -> None:
    """Bit-equal to the stream itself, every field, over three steps from a start in the middle."""
    for number, step in enumerate(_steps(stream, 100, micro, size, 3)):
        expected = [stream[100 + number * GLOBAL + i] for i in range(GLOBAL)]
        for field, value in step.items():
            assert torch.equal(value, torch.stack([sample[field] for sample in expected]))


def test_a_resumed_run_goes_on_at_the_next_sample(stream: SampleStream) -> None:
    """Two steps, then two from where they ended, are four steps."""
    whole = _steps(stream, 0, 2, 2, 4)
    parts = _steps(stream, 0, 2, 2, 2) + _steps(stream, 2 * GLOBAL, 1, 4, 2)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("batch", "micro", "size"), [(8, 3, 1), (8, 2, 3), (4, 8, 1)])
def test_a_batch_that_cannot_be_divided(stream: SampleStream, batch: int, micro: int, size: int) -> None:
    """All three numbers are named, at the call."""
    with pytest.raises(
        RequestError, match=f"global batch {batch} is not .* micro-batch {micro} x data parallel {size}"
    ):
        batches(stream, 0, batch, micro, 0, size)


def test_the_end_of_the_data_is_an_error_at_its_step(tmp_path: Path) -> None:
    """All whole global batches are given before it; the thread has ended."""
    data_cases.datasets(tmp_path, {"web": 10})
    finite = SampleStream(data_cases.config(tmp_path, {"web": 1}, epochs=True), seed=2)
    assert finite.limit_samples
    given = 0
    with pytest.raises(RequestError, match="the data ends after"):
        for _ in batches(finite, 0, GLOBAL, GLOBAL, 0, 1):
            given += 1
    assert given == finite.limit_samples // GLOBAL
    assert not _threads()


def test_samples_are_read_ahead_and_no_further_than_asked(stream: SampleStream) -> None:
    """With the reader idle the thread fills its queue, then waits."""

    class Counting:
        """The stream, counting reads."""

        reads = 0

        def __getitem__(self, index: int) -> Batch:
            self.reads += 1
            return stream[index]

        def check_budget(self, samples: int) -> None:
            """No end."""

        def want(self, indices: Iterable[int]) -> None:
            """All is here."""

    counting = Counting()
    ahead = batches(counting, 0, GLOBAL, GLOBAL, 0, 1, prefetch=2)  # type: ignore[arg-type]
    next(ahead)
    deadline = time.monotonic() + 10
    while counting.reads < 4 * GLOBAL and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert counting.reads == 4 * GLOBAL  # one given, two in the queue, one in hand
    ahead.close()
    assert not _threads()


def test_a_dropped_iterator_ends_its_thread(stream: SampleStream) -> None:
    """Closing, dropping, and never starting leave no thread behind."""
    unused = batches(stream, 0, GLOBAL, 2, 0, 1)
    used = batches(stream, 0, GLOBAL, 2, 0, 1)
    next(used)
    assert len(_threads()) == 1
    del unused, used
    gc.collect()
    assert not _threads()


@pytest.mark.parametrize(("micro", "size"), [(8, 1), (1, 2), (2, 4), (1, 8)])
def test_validation_counts_each_sample_once_under_every_layout(stream: SampleStream, micro: int, size: int) -> None:
    """Of 13 samples in batches of 8 the unmasked ones are the first 13; the rest of the last batch is masked."""
    ranks = [list(validation_batches(stream, 13, GLOBAL, micro, rank, size)) for rank in range(size)]
    steps = [_joined([part for rank in ranks for part in rank[step]]) for step in range(2)]
    assert {len(rank) for rank in ranks} == {2}
    tokens, mask = (torch.cat([step[field] for step in steps]) for field in ("tokens", "loss_mask"))
    assert torch.equal(tokens[:13], torch.stack([stream[i]["tokens"] for i in range(13)]))
    assert mask[:13].min() == 1 and mask[13:].max() == 0 and len(mask) == 16
    with pytest.raises(RequestError, match="global batch 8 is not divisible"):
        next(validation_batches(stream, 13, GLOBAL, 3, 0, size))


def test_a_reader_that_is_slower_than_the_thread_gets_every_step(stream: SampleStream) -> None:
    """The thread tries for a tenth of a second to give a step away, again and again."""
    feed = batches(stream, 0, GLOBAL, GLOBAL, 0, 1, prefetch=1)
    next(feed)
    time.sleep(0.35)
    found = [next(feed)[0]["tokens"] for _ in range(3)]
    feed.close()
    for step, tokens in enumerate(found, 1):
        assert torch.equal(tokens, torch.stack([stream[step * GLOBAL + i]["tokens"] for i in range(GLOBAL)]))
