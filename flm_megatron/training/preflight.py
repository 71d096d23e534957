"""What is checked and filled in before any process starts: the rules of the run file, its tokenizer and its data."""

from __future__ import annotations

from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError


def resolve(run: RunConfig) -> RunConfig:
    """The run with its vocabulary filled in from the tokenizer, its data found and fitting.

    Raises:
        RequestError: no tokenizer, no data, or data made with another tokenizer.
    """
    from flm_megatron.data.description import check_datasets
    from flm_megatron.data.tokenizer import Tokenizer

    if run.tokenizer is None:
        raise RequestError("tokenizer is not set: give the SentencePiece model the data was made with")
    if not run.data.train:
        raise RequestError("data.train has no sources: name at least one dataset made by `flm data build`")
    tokenizer = Tokenizer(run.tokenizer)
    check_datasets(run.data, tokenizer)
    return resolve_vocabulary(run, tokenizer.vocab_size)
