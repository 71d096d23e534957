"""Measuring how near each layer of a checkpoint is to the identity."""

from __future__ import annotations

from functools import partial

from flm_megatron.api.shape.on_text import checkpoint_on_text
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.world import layout, tool_world
from flm_megatron.growth.distance import LayerDistance
from flm_megatron.growth.distance import layer_distances as measured
from flm_megatron.paths import FilePath


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
        RequestError: the run file breaks a rule, there is no such checkpoint or stage, the tokenizer is not the
            checkpoint's, or too little text.
        DamagedError: the checkpoint cannot be read.
    """
    opened, model, stage, tokens = checkpoint_on_text(checkpoint, run, text, samples)
    with tool_world(run.distributed):
        return measured(opened, model, stage, tokens[:, :-1], partial(layout, timeout_s=run.distributed.timeout_s))
