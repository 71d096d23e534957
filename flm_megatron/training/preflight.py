"""What is checked and filled in before any process starts: rules of the run file, kernels, tokenizer and data."""

from __future__ import annotations

from flm_megatron import kernels
from flm_megatron.checkpoint.run_file import with_checkpoint_models
from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.kernels import fp8


def resolve(run: RunConfig, start_anew: bool = False) -> RunConfig:
    """The run with its vocabulary filled in from the tokenizer, its data found and fitting.

    With `start_anew` it begins at `checkpoint.initial` even where it has checkpoints of its own.

    Raises:
        RequestError: a broken rule, a kernel that is asked for by name or FP8 and not there, no tokenizer, no data,
            data made with another tokenizer, conversations, a growth that cannot be done, or a first stage that is of
            another model than `checkpoint.initial`.
        DamagedError: `checkpoint.initial` cannot be read.
    """
    from flm_megatron.data.description import check_datasets
    from flm_megatron.data.tokenizer import Tokenizer
    from flm_megatron.growth.boundary import check_boundary
    from flm_megatron.training.first_view import check_initial
    from flm_megatron.training.start import has_checkpoints

    if run.data.chat is not None:
        raise RequestError("data.chat makes this a fine-tuning: run it with `flm sft`")
    run = with_checkpoint_models(run)
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
    if start_anew or not has_checkpoints(run):
        check_initial(run)
    return run
