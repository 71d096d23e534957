"""What is checked and filled in before any process starts: rules of the run file, kernels, tokenizer and data."""

from __future__ import annotations

from flm_megatron import kernels
from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.kernels import fp8


def resolve(run: RunConfig) -> RunConfig:
    """The run with its vocabulary filled in from the tokenizer, its data found and fitting.

    Raises:
        RequestError: a broken rule, a kernel that is asked for by name or FP8 and not there, no tokenizer, no data,
            data made with another tokenizer, conversations, or a growth that cannot be done.
    """
    from flm_megatron.data.description import check_datasets
    from flm_megatron.data.tokenizer import Tokenizer
    from flm_megatron.growth.boundary import check_boundary

    if run.data.chat is not None:
        raise RequestError("data.chat makes this a fine-tuning: run it with `flm sft`")
    check(run)
    kernels.choose(run.kernels)
    for stage in run.stages:
        fp8.require(stage)
    if run.tokenizer is None:
        raise RequestError("tokenizer is not set: give the SentencePiece model the data was made with")
    if not run.data.train:
        raise RequestError("data.train has no sources: name at least one dataset made by `flm data build`")
    tokenizer = Tokenizer(run.tokenizer)
    check_datasets(run.data, tokenizer)
    run = resolve_vocabulary(run, tokenizer.vocab_size)
    for index in range(len(run.stages)):
        check_boundary(run, index)
    return run
