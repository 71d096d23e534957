"""A tokenizer, conversations and a checkpoint to fine-tune, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.config.schema.stage import Recompute
from flm_megatron.distributed.world import layout
from flm_megatron.training.step import Batch, TrainState
from tests.support.chat_cases import conversation, tokenizer, write
from tests.support.layouts import micro_batches

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=290
)
SEED = 5
LENGTH = 160
Gradients = dict[str, torch.Tensor]


def chat_folder(folder: Path) -> Path:
    """`tokenizer.model`, 24 conversations in `chat.jsonl`, and fresh weights of MODEL in `base`."""
    model = tokenizer(folder)
    write(folder / "chat.jsonl", [conversation(i) for i in range(24)])
    stages = [StageConfig(name="base", model=MODEL, tokens=1)]
    run = RunConfig(tokenizer=model.path, data=DataConfig(sequence_length=512), stages=stages)
    known = dict.fromkeys(("step", "tokens", "samples", "optimizer_step"), 0)
    checkpoint = InitialCheckpoint(MODEL, SEED)
    copy_checkpoint(
        checkpoint, folder / "base", Manifest.from_json({"run": run_to_dict(run), "stage": "base", **known})
    )
    return folder


def gradients(
    parallel: ParallelConfig,
    model: ModelConfig,
    checkpoint: LogicalCheckpoint,
    batches: list[Batch],
    recompute: Recompute = "none",
) -> list[Any]:
    """With the weights of `checkpoint`, for each global batch: loss, trained tokens, this rank's parts of the gradient.

    The loss is the mean over trained tokens, the gradient the loss's.
    """
    parallel = replace(parallel, distributed_optimizer=False)
    stage = StageConfig(model=model, micro_batch=2, parallel=parallel, recompute=recompute)
    found = []
    with layout(stage.parallel, 120):
        state = TrainState(stage, LENGTH)
        load_state(checkpoint, state.chunks, state.optimizer)
        for batch in batches:
            for chunk in state.chunks:
                chunk.zero_grad_buffer()
            loss, tokens, *_ = state._losses(micro_batches(batch, 2), forward_only=False)
            parts = [
                (p.name, p.region, p.parameter.main_grad[p.local.slices].reshape(p.region.sizes).clone())  # type: ignore[attr-defined]
                for p in placements(state.chunks)
                if p.parameter.requires_grad
            ]
            found.append((loss / tokens, tokens, parts))
    return found


def whole(ranks: list[Any], checkpoint: LogicalCheckpoint) -> Gradients:
    """The logical gradient out of the parts of all ranks."""
    result = {name: torch.zeros(info.shape) for name, info in checkpoint.tensors.items()}
    for parts in ranks:
        for name, region, values in parts:
            assert isinstance(region, Region)
            result[name][region.slices] = values
    return result


def furthest(found: Gradients, expected: Gradients) -> float:
    """Largest difference of an entry, over the largest entry of its tensor."""
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)
