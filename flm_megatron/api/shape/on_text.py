"""What the commands that change a shape, or measure for it, share: a checkpoint, and the text that it is run on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from flm_megatron.api.checkpoint import given_checkpoint
from flm_megatron.api.values import require_whole
from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.own_tokenizer import check_tokenizer
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.distributed.world import is_main_rank, tool_world
from flm_megatron.growth.certificate.forward import Layout
from flm_megatron.growth.certificate.measure import boundary_certificate, change_settings
from flm_megatron.growth.certificate.text import file_tokens, run_tokens
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.record import Certificate
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint
from flm_megatron.paths import FilePath, given_path


def changing_world(run: RunConfig, runs_a_model: bool) -> AbstractContextManager[object]:
    """The processes that write a checkpoint of another shape: with the run's world only where a model is run."""
    return tool_world(run.distributed) if runs_a_model else launched_processes()


def certified_on_text(
    text: FilePath | None,
    run: RunConfig,
    index: int,
    checkpoint: GrownCheckpoint | ShrunkCheckpoint,
    under: Layout,
    on_certificate: Callable[[Certificate], None] | None,
) -> Certificate | None:
    """The certificate of the checkpoint that stage `index` begins with, measured on the file `text`; none without one.

    `on_certificate` is called with it on the first process. Raises as `file_tokens` and `boundary_certificate`.
    """
    if text is None:
        return None
    samples = max(1, change_settings(run.stages[index]).certify_samples)
    tokens = file_tokens(given_path(text, "certify"), run, samples)
    certificate = boundary_certificate(checkpoint, run, index, under, tokens)
    if certificate is not None and on_certificate is not None and is_main_rank():
        on_certificate(certificate)
    return certificate


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
        RequestError: the run file breaks a rule, there is no such checkpoint or stage, the tokenizer is not the
            checkpoint's, or too little text.
        DamagedError: the checkpoint cannot be read.
    """
    require_whole("samples", samples)
    check_run_file(run)
    opened = given_checkpoint(checkpoint)
    name = stage or opened.manifest.position.stage or run.stages[0].name
    chosen = run.stages[stage_index(run, name)]
    model = recorded_model(opened, chosen.model.vocab_size) or chosen.model
    if run.tokenizer is not None and tokenizer_exists(run.tokenizer):
        check_tokenizer(open_tokenizer(run.tokenizer), model, "the checkpoint", opened.manifest)
    tokens = run_tokens(run, samples) if text is None else file_tokens(given_path(text, "text"), run, samples)
    return opened, model, chosen, tokens
