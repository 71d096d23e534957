"""Floating-point operations of a step as the program does them: recomputation counts, and causal attention whole (of a
sliding window as many keys as it has, for every query)."""

from __future__ import annotations

from flm_megatron.model.parameters import FC1, FC2, ParameterSpec
from flm_megatron.planner.layout import Workload

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Products of flash attention: its backward pass computes the scores again."""


def step_flops(work: Workload, rank: int) -> dict[str, int]:
    """Operations of a step on each tensor and data rank of pipeline rank `rank`, by what they are."""
    layers = sum(work.chunks(rank))
    products = layers * sum(_layer_products(work, spec) for spec in work.specs if spec.place == "layers")
    if rank == work.parallel.pipeline - 1:
        each = 2 * work.tokens * work.embedding_parameters
        products += each * (2 + work.trains_weights)
    attention = {"attention": work.micro_batches * layers * _layer_attention(work)} if layers else {}
    return {"matrix products": work.micro_batches * products, **attention}


def _layer_products(work: Workload, spec: ParameterSpec) -> int:
    """Of one layer and micro-batch: the product with the matrix, the gradient of what it reads, and its own."""
    if spec.kind != "matrix":
        return 0
    # A factor of an adapter that every tensor rank has whole meets that rank's part of the sequence alone.
    tokens = work.tokens if spec.cut else work.tokens // work.sequence_parallel
    product = 2 * tokens * (spec.shard_numel(work.parallel.tensor) // work.model.num_layers)
    return product * (1 + work.forward_passes(spec.module in (FC1, FC2)) + spec.trained)


def _layer_attention(work: Workload) -> int:
    heads = work.model.num_attention_heads // work.parallel.tensor
    keys = min(work.model.sliding_window or work.sequence_length, work.sequence_length)
    product = 2 * work.tokens * heads * keys * work.model.kv_channels
    again = work.recompute in ("full", "attention")
    return product * (FORWARD_PRODUCTS * (1 + again) + BACKWARD_PRODUCTS)
