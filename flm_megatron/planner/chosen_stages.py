"""The stages that a command works on, without their data: one by its name, and the size of the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig


def only_stage(config: RunConfig, name: str | None) -> RunConfig:
    """The run with the named stage alone, so that rules and totals are its own.

    Raises:
        RequestError: there is no such stage, or none at all.
    """
    from flm_megatron.config.stage_names import stage_index
    from flm_megatron.errors import RequestError

    if not config.stages:
        raise RequestError("stages is empty: give at least one stage")
    if name is None:
        return config
    stage = config.stages[stage_index(config, name)]
    return replace(config, stages=[replace(stage, growth=None, shrink=None)])


def whole_run(config: RunConfig, chosen: RunConfig) -> RunConfig:
    """The run that stages were chosen from, its other stages with the vocabulary of these: growth keeps it."""
    size = chosen.stages[0].model.vocab_size
    stages = [
        replace(stage, model=replace(stage.model, vocab_size=stage.model.vocab_size or size)) for stage in config.stages
    ]
    return replace(config, stages=stages)


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The run with the vocabulary sizes that its file leaves to the tokenizer.

    Raises:
        RequestError: they are not known, for there is no tokenizer.
    """
    from flm_megatron.config.loader import resolve_vocabulary
    from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists
    from flm_megatron.errors import RequestError

    if all(stage.model.vocab_size for stage in config.stages):
        return config
    if config.tokenizer is None or not tokenizer_exists(config.tokenizer):
        raise RequestError(
            f"the vocabulary size is not known: there is no tokenizer at {config.tokenizer!r}; "
            "give a size, such as --stages.0.model.vocab_size 80000"
        )
    return resolve_vocabulary(config, open_tokenizer(config.tokenizer).vocab_size)
