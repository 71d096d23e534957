"""The planner's memory against a real step: bytes of all live tensors of every rank, at their peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig, LoraConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision, Recompute
from flm_megatron.distributed.world import layout
from flm_megatron.planner.cost.memory import rank_memory
from flm_megatron.planner.layout import CPU, Workload, as_chosen
from flm_megatron.training.step import TrainState
from tests.support.live_bytes import LiveBytes
from tests.support.pool import Pool

TELE_FLM = ModelConfig(num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=500)
FLM_101B = ModelConfig(
    num_layers=5,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=1000,
    normalization="layernorm",
    activation="gelu",
    bias=True,
    position="xpos",
)
STAGE = StageConfig(model=TELE_FLM, micro_batch=2, global_batch=8)
LAYOUTS = [
    ParallelConfig(pipeline=2, virtual_pipeline=2),
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
    ParallelConfig(data=2, distributed_optimizer=False),
]
MORE_LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(data=2),
]
AUTO = KernelsConfig()
TOLERANCE = 0.03


def peak_of_a_step(stage: StageConfig, sequence: int, wanted: KernelsConfig) -> int:
    """Most bytes of tensors alive during this rank's second step, what is always there included."""
    from flm_megatron.engine.prepare import prepare

    prepare()
    kernels.use(kernels.choose(wanted))
    with layout(stage.parallel, timeout_s=120):
        state = TrainState(stage, sequence)
        samples = stage.global_batch // (stage.parallel.data or 1)
        state.train_step(batches(stage, sequence, samples))  # the optimizer makes its state on its first step
        live = LiveBytes()
        live.count_existing()
        with live:
            state.train_step(batches(stage, sequence, samples))
        return live.peak


def batches(stage: StageConfig, sequence: int, samples: int) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of random tokens."""
    shape = (stage.micro_batch, sequence)
    vocab = stage.model.vocab_size or 0

    def batch() -> dict[str, Any]:
        return {
            "tokens": torch.randint(vocab, shape),
            "labels": torch.randint(vocab, shape),
            "position_ids": torch.arange(sequence).expand(shape),
            "loss_mask": torch.ones(shape),
        }

    return [batch() for _ in range(samples // stage.micro_batch)]


def check(pool: Pool, stage: StageConfig, sequence: int = 64, wanted: KernelsConfig = AUTO) -> None:
    """Every rank's counted peak is within the tolerance of what was planned."""
    parallel, data = stage.parallel, stage.parallel.data or 1
    world = parallel.model_size * data
    work = Workload(
        stage.model,
        sequence,
        stage.global_batch,
        stage.micro_batch,
        parallel,
        data,
        stage.precision,
        stage.recompute,
        as_chosen(CPU, wanted),
    )
    counted = pool.run(world, peak_of_a_step, stage, sequence, wanted)
    for rank, bytes_counted in enumerate(counted):
        planned = rank_memory(work, rank // (world // parallel.pipeline)).total
        assert planned == pytest.approx(bytes_counted, rel=TOLERANCE), f"rank {rank} of {parallel}"


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_a_layout_needs_what_is_planned(pool: Pool, parallel: ParallelConfig) -> None:
    check(pool, replace(STAGE, parallel=parallel))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", MORE_LAYOUTS, ids=str)
def test_more_layouts_need_what_is_planned(pool: Pool, parallel: ParallelConfig) -> None:
    check(pool, replace(STAGE, parallel=parallel))


@pytest.mark.parametrize(("precision", "recompute"), [("bf16", "selective"), ("fp32", "full")])
def test_long_sequences_need_what_is_planned(pool: Pool, precision: Precision, recompute: Recompute) -> None:
    check(pool, replace(STAGE, precision=precision, recompute=recompute), sequence=256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "recompute"), [("fp32", "none"), ("fp32", "selective"), ("bf16", "none"), ("bf16", "full")]
)
def test_more_recomputation_needs_what_is_planned(pool: Pool, precision: Precision, recompute: Recompute) -> None:
    check(pool, replace(STAGE, precision=precision, recompute=recompute), sequence=256)


def test_grouped_queries_biases_gelu_and_xpos_need_what_is_planned(pool: Pool) -> None:
    check(pool, replace(STAGE, model=FLM_101B, precision="bf16", parallel=ParallelConfig(pipeline=2)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2, sequence=True)], ids=str)
def test_a_head_that_keeps_no_logits_needs_what_is_planned(
    pool: Pool, parallel: ParallelConfig, precision: Literal["fp32", "bf16"]
) -> None:
    stage = replace(STAGE, model=replace(TELE_FLM, vocab_size=4000), parallel=parallel, precision=precision)
    check(pool, stage, sequence=1024, wanted=KernelsConfig(head_and_loss="fused"))


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [(ParallelConfig(pipeline=2), "fp32"), (ParallelConfig(tensor=2, sequence=True), "bf16")],
    ids=str,
)
def test_adapters_beside_frozen_weights_need_what_is_planned(
    pool: Pool, parallel: ParallelConfig, precision: Precision
) -> None:
    """No gradient and no optimizer state of the weights, the large embedding and head among them."""
    model = replace(TELE_FLM, vocab_size=8000, lora=LoraConfig(rank=4))
    check(pool, replace(STAGE, model=model, parallel=parallel, precision=precision))
