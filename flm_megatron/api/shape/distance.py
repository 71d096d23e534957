"""Measuring how near each layer of a checkpoint is to the identity."""

from __future__ import annotations

from functools import partial

from flm_megatron.api.checkpoint import given_checkpoint
from flm_megatron.api.values import require_whole
from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import RunConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.distributed.world import layout, tool_world
from flm_megatron.growth.distance import LayerDistance
from flm_megatron.growth.distance import layer_distances as measured
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.text import file_tokens, run_tokens
from flm_megatron.paths import FilePath, given_path


def layer_distances(
    checkpoint: FilePath | LogicalCheckpoint,
    run: RunConfig,
    *,
    text: FilePath | None = None,
    samples: int = 8,
) -> list[LayerDistance]:
    """Distance between input and output of each layer, first to last, by which growth can choose the layers it copies.

    The model is run in this process, or by all that torchrun started, which then all call. `run` has the checkpoint's
    stage: its layout, tokenizer and data; `samples` of its validation data are read, or of the file `text`.
    `[layer.cosine for layer in ...]` is what `grow` takes as `distances`.

    Raises:
        RequestError: the run file breaks a rule, there is no such checkpoint or stage, or too little text.
        DamagedError: the checkpoint cannot be read.
    """
    require_whole("samples", samples)
    check_run_file(run)
    opened = given_checkpoint(checkpoint)
    stage = run.stages[stage_index(run, opened.manifest.position.stage or run.stages[0].name)]
    tokens = run_tokens(run, samples) if text is None else file_tokens(given_path(text, "text"), run, samples)
    with tool_world(run.distributed):
        model = recorded_model(opened, stage.model.vocab_size) or stage.model
        return measured(opened, model, stage, tokens[:, :-1], partial(layout, timeout_s=run.distributed.timeout_s))
