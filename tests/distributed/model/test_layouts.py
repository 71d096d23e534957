"""Losses and gradients of the model under parallel layouts against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flm_megatron.config.schema import ModelConfig, MupConfig, ParallelConfig, RopeScaling
from flm_megatron.model.parameters import EMBEDDING
from tests.support.pool import Pool
from tests.support.reference_model import random_tensors, reference_loss

MICRO_BATCHES, SEQUENCE = 4, 16
SHAPE: dict[str, Any] = {
    "num_layers": 5,
    "hidden_size": 64,
    "ffn_hidden_size": 112,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 201,
}
Result = tuple[np.ndarray | None, dict[str, np.ndarray], dict[str, np.ndarray]]
MODELS = {
    "mup": ModelConfig(
        **SHAPE,
        qkv_bias=True,
        query_key_norm=True,
        input_mult=1.5,
        output_mult=2.0,
        mup=MupConfig(enabled=True, base_hidden_size=32),
        rotary_percent=0.5,
        rope_scaling=RopeScaling("llama3", 4.0, 16),
    ),
    "gpt3": ModelConfig(
        **SHAPE,
        normalization="layernorm",
        activation="gelu",
        bias=True,
        position="xpos",
        xpos_scale_base=8,
        sliding_window=6,
        tie_embeddings=True,
    ),
    "learned": ModelConfig(
        **SHAPE,
        normalization="layernorm",
        activation="gelu_tanh",
        bias=True,
        parallel_residual=True,
        position="learned",
        max_positions=SEQUENCE + 1,
        input_mult=1.5,
    ),
}
LAYOUTS = [
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(pipeline=2, pipeline_layers=[1, 4]),
    ParallelConfig(pipeline=2, virtual_pipeline=2),
    pytest.param(ParallelConfig(tensor=4, sequence=True), marks=pytest.mark.slow),  # under pipelines below
    ParallelConfig(pipeline=4),
    ParallelConfig(tensor=2, pipeline=2, sequence=True, virtual_pipeline=2, pipeline_layers=[1, 2, 1, 1]),
    ParallelConfig(tensor=4, pipeline=2, sequence=True),
]
RECOMPUTED = [
    (ParallelConfig(tensor=2, sequence=True), "selective"),
    (ParallelConfig(tensor=2, pipeline=2, sequence=True, virtual_pipeline=2), "selective"),
    (ParallelConfig(tensor=2, pipeline=2, sequence=True, virtual_pipeline=2), "full"),
]


def label(parallel: ParallelConfig) -> str:
    """Short name of a layout: t2s is tensor 2 with sequence parallelism, p2v2 a virtual pipeline of 2."""
    name = f"t{parallel.tensor}{'s' * parallel.sequence}p{parallel.pipeline}v{parallel.virtual_pipeline}"
    return name + "".join(f"-{count}" for count in parallel.pipeline_layers or [])


@cache
def expected(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss of every token [micro-batch, sequence] and gradients of their sum, in float64."""
    from tests.support.filled_model import seeded_batch

    model = MODELS[name]
    tensors = {key: x.double().requires_grad_() for key, x in random_tensors(model).items()}
    loss = reference_loss(model, tensors, *seeded_batch(model, MICRO_BATCHES, SEQUENCE))
    loss.sum().backward()
    return loss.detach().numpy(), {key: x.grad.numpy() for key, x in tensors.items() if x.grad is not None}


@pytest.mark.parametrize("parallel", LAYOUTS, ids=label)
def test_losses_and_gradients_equal_the_reference(pool: Pool, parallel: ParallelConfig) -> None:
    check(parallel, pool.run(parallel.model_size, losses_and_gradients, parallel, "none"))


@pytest.mark.parametrize(("parallel", "recompute"), RECOMPUTED, ids=[f"{label(p)}-{r}" for p, r in RECOMPUTED])
def test_recomputation_equals_the_reference(pool: Pool, parallel: ParallelConfig, recompute: str) -> None:
    check(parallel, pool.run(parallel.model_size, losses_and_gradients, parallel, recompute))


def check(parallel: ParallelConfig, ranks: list[dict[str, Result]]) -> None:
    """Every rank's results put together are the reference's, for every model."""
    for name in MODELS:
        losses, gradients = expected(name)
        ends = [loss for loss, _, _ in (rank[name] for rank in ranks) if loss is not None]
        assert len(ends) == parallel.tensor
        for loss in ends:
            assert relative(loss, losses) < 1e-5
        for key, gradient in gradients.items():
            copies = np.sum([rank[name][2][key] for rank in ranks], axis=0)
            assert copies.min() >= 1, f"no rank holds all of {key}"
            if MODELS[name].tie_embeddings and key == EMBEDDING and parallel.pipeline > 1:
                copies = copies / 2  # the ends of a pipeline have a part of the gradient each
            found = np.sum([rank[name][1][key] for rank in ranks], axis=0) / copies
            assert relative(found, gradient) < 1e-5, key


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - exact).max() / np.abs(exact).max())


def losses_and_gradients(parallel: ParallelConfig, recompute: str) -> dict[str, Result]:
    """On each rank: token losses (at the end of the pipeline), gradients of its shards, ones where they lie."""
    from flm_megatron.distributed.world import layout

    with layout(parallel, timeout_s=120):
        return {name: run_model(model, parallel, recompute) for name, model in MODELS.items()}


def run_model(model: ModelConfig, parallel: ParallelConfig, recompute: str) -> Result:
    """One forward and backward pass of all micro-batches by the engine's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from flm_megatron.engine import parallel_state
    from tests.support.filled_model import filled_model, gradients, seeded_batch

    tensors = random_tensors(model)
    chunks = filled_model(model, tensors, parallel=parallel, recompute=recompute)
    tokens, labels = seeded_batch(model, MICRO_BATCHES, SEQUENCE)
    batches = zip(tokens.split(1), labels.split(1), strict=True)
    data = [list(batches)] * len(chunks)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for batch in data] if len(chunks) > 1 else iter(data[0]),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
    sum_over_parts(chunks, parallel_state.get_tensor_model_parallel_group())
    found = gradients(chunks, tensors)
    for parameter in parameters(chunks):
        parameter.grad = torch.ones_like(parameter)
    losses = np.concatenate([part["loss"].numpy() for part in outputs]) if outputs else None
    return losses, as_arrays(found), as_arrays(gradients(chunks, tensors))


def forward_step(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], chunk: torch.nn.Module) -> tuple[Any, Any]:
    """The engine's forward step: the sum of the losses, to be divided by the number of tokens later."""
    tokens, labels = next(batches)
    return chunk(tokens, labels=labels), summed


def summed(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens, number of tokens, and the token losses for the test."""
    return loss.sum(), torch.tensor(loss.numel(), dtype=torch.int), {"loss": loss.detach().clone()}


def parameters(chunks: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """Parameters of all chunks."""
    for chunk in chunks:
        yield from chunk.parameters()


def sum_over_parts(chunks: list[Any], group: dist.ProcessGroup) -> None:
    """Gradients of whole parameters that come from a part each, of the sequence or of the heads: the engine's sums."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    for chunk in chunks:
        chunk.ddp_config = DistributedDataParallelConfig()
    _allreduce_non_tensor_model_parallel_grads(chunks, chunks[0].config, group)


def as_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same as numpy arrays, which travel between processes by value."""
    return {key: tensor.numpy() for key, tensor in tensors.items()}
