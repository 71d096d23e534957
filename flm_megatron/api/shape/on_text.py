"""A checkpoint and the text that it is to be run on, as the commands that measure on text name them."""

from __future__ import annotations

import torch

from flm_megatron.api.checkpoint import given_checkpoint
from flm_megatron.api.values import require_whole
from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.growth.certificate.text import file_tokens, run_tokens
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.paths import FilePath, given_path


def checkpoint_on_text(
    checkpoint: FilePath | LogicalCheckpoint,
    run: RunConfig,
    text: FilePath | None,
    samples: int,
    stage: str | None = None,
) -> tuple[LogicalCheckpoint, ModelConfig, StageConfig, torch.Tensor]:
    """The opened checkpoint, its model, the stage of `run` (by default its own), and tokens [samples, sequence + 1].

    `samples` of the run's validation data are read, or of the file `text`.

    Raises:
        RequestError: the run file breaks a rule, there is no such checkpoint or stage, or too little text.
        DamagedError: the checkpoint cannot be read.
    """
    require_whole("samples", samples)
    check_run_file(run)
    opened = given_checkpoint(checkpoint)
    name = stage or opened.manifest.position.stage or run.stages[0].name
    chosen = run.stages[stage_index(run, name)]
    tokens = run_tokens(run, samples) if text is None else file_tokens(given_path(text, "text"), run, samples)
    model = recorded_model(opened, chosen.model.vocab_size) or chosen.model
    return opened, model, chosen, tokens
