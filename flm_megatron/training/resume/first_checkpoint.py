"""What the first stage starts from: `checkpoint.initial`, checked against the model, or fresh weights."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from flm_megatron.checkpoint.described import recorded_model, without_padding
from flm_megatron.checkpoint.lazy.adapters import WithNewAdapters
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.lazy.untied import UntiedCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, adam_step
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.own_tokenizer import check_tokenizer
from flm_megatron.config.same_model import differences
from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import saved_mask_value
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.storage.path import location

logger = logging.getLogger(__name__)


def first_checkpoint(run: RunConfig, model: ModelConfig, source: Path | None) -> LogicalCheckpoint:
    """What the first stage starts from: a checkpoint's weights (`checkpoint.initial`), or fresh ones.

    Raises:
        RequestError: the checkpoint is of another model than `model`, all differences are named; its tensors are not
            the model's; or it was saved while a growth mask was half open.
    """
    if source is None:
        return InitialCheckpoint(model, run.seed)
    return _loaded(run, model, source)[0]


def check_initial(run: RunConfig) -> None:
    """Check `checkpoint.initial` against the first stage and the run's tokenizer before any process starts.

    Of the processes that a launcher started only the first checks. Things worth knowing (a checkpoint that does not
    record its model, another muP) are logged.

    Raises:
        RequestError: as `first_checkpoint`, it was trained with another tokenizer, or its moments cannot be gone on
        from. DamagedError: it cannot be read.
    """
    if run.checkpoint.initial is None or int(os.environ.get("RANK", 0)) > 0:
        return
    source, model = location(run.checkpoint.initial), run.stages[0].model
    checkpoint, found = _loaded(run, model, source)
    adam_step(checkpoint)
    if run.tokenizer is not None:
        check_tokenizer(open_tokenizer(run.tokenizer), model, str(source), checkpoint.manifest, source)
    for line in _remarks(found, model):
        logger.warning("%s: %s", source, line)


def _remarks(found: ModelConfig | None, model: ModelConfig) -> list[str]:
    if found is None:
        return ["it does not say what model it is of; only names and shapes of its tensors were compared"]
    if found.width_factor != model.width_factor:
        factors = f"m is {model.width_factor:g} in the run file and {found.width_factor:g} in the checkpoint"
        return [f"muP's {factors}: the logits are the same, learning rates follow the run file"]
    return []


def _loaded(run: RunConfig, model: ModelConfig, source: Path) -> tuple[LogicalCheckpoint, ModelConfig | None]:
    """`source` as a checkpoint of `model`, and the model that it records; raises as `first_checkpoint`."""
    checkpoint = open_checkpoint(source, model.vocab_size)
    check_no_mask(checkpoint.manifest, str(source))
    found = recorded_model(checkpoint, model.vocab_size)
    if found is not None and found.tie_embeddings and not model.tie_embeddings:
        checkpoint, found = UntiedCheckpoint(checkpoint), replace(found, tie_embeddings=False)
    if found is not None and (other := differences(model, found)):
        raise RequestError(
            f"{source} is of another model than the first stage: {'; '.join(other)}; set them as the checkpoint has "
            "them, or take its model with `model: from_checkpoint`"
        )
    checkpoint = without_padding(checkpoint, model)
    if model.lora is not None:
        checkpoint = WithNewAdapters(checkpoint, model, run.seed)
    _check_shapes(checkpoint, model, run.seed, source)
    return checkpoint, found


def check_no_mask(manifest: Manifest, source: str) -> None:
    """Refuse a checkpoint whose growth masks are half open: its weights alone are not its function.

    Raises:
        RequestError: it has such masks.
    """
    if (opening := saved_mask_value(manifest)) < 1:
        raise RequestError(
            f"{source} was saved while its growth masks were open to {opening:.3g}: train it until "
            "they are off, or start from `flm checkpoint export-hf --fold-mask`"
        )


def _check_shapes(checkpoint: LogicalCheckpoint, model: ModelConfig, seed: int, source: Path) -> None:
    """Every tensor of the model must be there in its shape, with none that only another kind of block has."""
    wanted = InitialCheckpoint(model, seed).tensors
    for name, info in wanted.items():
        found = checkpoint.tensors[name].shape if name in checkpoint.tensors else None
        if found != info.shape:
            raise RequestError(f"{source}: {name} is {found}, but the first stage's model needs {info.shape}")
    blocks = replace(model, bias=True, query_key_norm=True, normalization="layernorm")
    fullest = parameter_specs(replace(blocks, tie_embeddings=False, max_positions=1))
    for name in fullest:
        if name in checkpoint.tensors and name not in wanted:
            raise RequestError(f"{source} has a tensor {name}, which the first stage's model has not")
