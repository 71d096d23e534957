"""Measuring how much each unit of a checkpoint's model matters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flm_megatron.api.shape.on_text import checkpoint_on_text
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.world import layout, tool_world
from flm_megatron.growth.shrink.importance import Criterion, Dimension, Importance
from flm_megatron.growth.shrink.measure import chosen_criteria
from flm_megatron.growth.shrink.measure import measure_importance as measured
from flm_megatron.paths import FilePath


def measure_importance(
    checkpoint: FilePath | LogicalCheckpoint,
    run: RunConfig,
    *,
    stage: str | None = None,
    text: FilePath | None = None,
    samples: int = 16,
    criteria: Mapping[Dimension, Criterion] | None = None,
) -> Importance:
    """How much each hidden channel, feed-forward unit, head and layer matters, by which shrinking chooses.

    The model is run in this process, or by all that torchrun started, which then all call. `importance.save(path)`
    writes the file that shrinking takes.

    Args:
        checkpoint: folder, or an open checkpoint.
        run: has the layout, tokenizer and data.
        stage: the stage of `run` whose layout and precision are used, and whose criteria if it shrinks; none means the
            checkpoint's own layout and precision.
        text: text file to measure on; none means the run's validation data.
        samples: how many of them.
        criteria: `activation` or `gradient` for `hidden`, `ffn` and `heads`, `influence` or `gradient` for `layers`;
            where none is given the `stage`'s, or the first.

    Raises:
        RequestError: the run file breaks a rule, there is no such checkpoint, stage or criterion, or too little text,
            or the tokenizer is not the checkpoint's.
        DamagedError: the checkpoint cannot be read.
    """
    opened, model, of_run, tokens = checkpoint_on_text(checkpoint, run, text, samples, stage)
    chosen = chosen_criteria(criteria or {}, of_run.shrink if stage else None)
    with tool_world(run.distributed):
        return measured(opened, model, of_run, tokens, partial(layout, timeout_s=run.distributed.timeout_s), chosen)
