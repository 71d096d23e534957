"""Token samples on which growths are certified and layer distances measured."""

from __future__ import annotations

from pathlib import Path

import torch

from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError


def run_tokens(run: RunConfig, samples: int) -> torch.Tensor:
    """The run's first validation samples (training ones where it has no validation data), [samples, sequence + 1]."""
    from flm_megatron.data.streams.stream import SampleStream

    stream = SampleStream(run.data, run.seed, "validation" if run.data.validation else "train")
    if stream.limit_samples is not None:
        samples = min(samples, stream.limit_samples)
    rows = [stream[i] for i in range(samples)]
    return torch.stack([torch.cat([row["tokens"], row["labels"][-1:]]) for row in rows])


def file_tokens(text: str | Path, run: RunConfig, samples: int) -> torch.Tensor:
    """Up to `samples` samples from the start of a text file, by the run's tokenizer, [samples, sequence + 1].

    Raises:
        RequestError: the file is missing, is not UTF-8 or is too short, or the run has no tokenizer.
    """
    from flm_megatron.data.tokenizer import open_tokenizer

    if run.tokenizer is None:
        raise RequestError("the run file names no tokenizer: set `tokenizer` to read a text file")
    try:
        content = Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{text}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{text} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    ids = torch.tensor(open_tokenizer(run.tokenizer).encode(content))
    length = run.data.sequence_length + 1
    if len(ids) < length:
        raise RequestError(f"{text} has {len(ids)} tokens, one sample takes {length}: give a longer text")
    return ids[: min(samples, len(ids) // length) * length].view(-1, length)
