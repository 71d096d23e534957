"""The text of a sample, by its name in the logs or by its index in the stream."""

from __future__ import annotations

from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import History
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.streams.stage_streams import training_stream
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError

LARGEST_SAMPLE = 10**12
"""More samples than any run takes; places beyond it cannot be computed exactly."""


def sample_text(run: RunConfig, sample: str, history: History = ()) -> str:
    """A line that names the sample, and its text; several of them where conversations are packed.

    `sample` is a name as in the log (SOURCE/EPOCH/SAMPLE), or the number of a training sample counted from the run's
    first. `history` is that of a run under way.

    Raises:
        RequestError: the run names no tokenizer or no data, or there is no such sample.
        DamagedError: the data cannot be read.
    """
    if run.tokenizer is None:
        raise RequestError("tokenizer is not set: give the tokenizer that the data was made with")
    tokenizer = open_tokenizer(run.tokenizer)
    number, stage = _number(sample), 0
    if number is not None:
        stage = max(i for i, budget in enumerate(stage_budgets(run, history)) if budget.first_sample <= number)
    stream = training_stream(run, stage, _up_to(sample, history))
    names = [sample] if number is None else stream.names(number)
    if not names:
        raise RequestError(f"there is no sample {sample}: the last epoch ends before it")
    parts = [(name, stream.ids(name)) for name in names]
    return "\n".join(f"{name}: {len(ids)} tokens\n{tokenizer.decode(ids)}" for name, ids in parts)


def _number(sample: str) -> int | None:
    """The number of a sample; none if it is a name. Raises RequestError for a number beyond any run."""
    if not (sample.isascii() and sample.isdigit()):
        return None
    if len(sample) > len(str(LARGEST_SAMPLE)) or int(sample) > LARGEST_SAMPLE:
        raise RequestError(f"there is no sample {sample[:40]}: give a number up to {LARGEST_SAMPLE}")
    return int(sample)


def _up_to(sample: str, history: History) -> History:
    """The history up to the segment of a sample: found by its number, or the last one with its source."""
    number = _number(sample)
    if number is not None:
        return tuple(segment for segment in history if segment.first_sample <= number)
    name = sample.rsplit("/", 2)[0]
    having = [number for number, segment in enumerate(history, 1) if name in (s.name for s in segment.sources)]
    return history[: having[-1]] if having else history
