"""Memory: parameters per rank, in-flight micro-batches, and published activation memory."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.kernels.loss import linear_loss
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.cost.activations import fuses_head, head_activations, head_tokens, layer_activations
from flm_megatron.planner.cost.memory import GIB, all_rank_memory, in_flight, rank_memory, worst_memory
from flm_megatron.planner.layout import CUDA, Implementation, Recompute, Workload, as_chosen, stage_workload

TELE_FLM = ModelConfig(num_layers=64, hidden_size=8192, ffn_hidden_size=21824, num_attention_heads=64, vocab_size=81920)
GPT_22B = ModelConfig(
    num_layers=48,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=64,
    vocab_size=51200,
    normalization="layernorm",
    activation="gelu",
    bias=True,
)
MEGATRON = Implementation(flash_attention=False, rotary=False, dropout=True)


def workload(model: ModelConfig = TELE_FLM, data: int = 1, **sizes: Any) -> Workload:
    """A step of 64 samples of 4,096 tokens."""
    parallel = ParallelConfig(**sizes, sequence=sizes.get("tensor", 1) > 1)
    return Workload(model, 4096, 64, 1, parallel, data)


def test_ranks_hold_every_parameter_once() -> None:
    """Without tensor parallelism, and with a vocabulary that needs no padding, the pipeline ranks add up."""
    work = workload(pipeline=8, virtual_pipeline=4)
    assert sum(work.rank_parameters(rank) for rank in range(8)) == parameter_count(TELE_FLM)


def test_tensor_ranks_repeat_norms_only() -> None:
    """The parameters beyond an equal share are those of the norms, which every tensor rank has."""
    norms = (2 * 64 + 1) * 8192
    held = workload(tensor=4).rank_parameters(0)
    assert 4 * held - parameter_count(TELE_FLM) == 3 * norms


@pytest.mark.parametrize(("precision", "together", "data_8"), [("bf16", 18, 6 + 12 / 8), ("fp32", 16, 8 + 8 / 8)])
def test_bytes_per_parameter(precision: Precision, together: float, data_8: float) -> None:
    """18 bytes a parameter in bf16 (weight, fp32 gradient, master, moments), 16 in fp32; the optimizer's are shared."""
    for data, expected in ((1, together), (8, data_8)):
        work = replace(workload(data=data), precision=precision)
        memory = rank_memory(work, 0)
        assert memory.weights + memory.gradients + memory.optimizer == expected * parameter_count(TELE_FLM)


def test_without_the_distributed_optimizer_data_ranks_share_nothing() -> None:
    work = replace(workload(data=8), parallel=ParallelConfig(distributed_optimizer=False))
    assert rank_memory(work, 0).optimizer == 12 * parameter_count(TELE_FLM)


@pytest.mark.parametrize(
    ("recompute", "sequence", "expected"),
    [("none", False, 34 + 5 * 64 * 2048 / 6144), ("attention", True, 34), ("full", True, 2)],
)
def test_activations_of_one_rank_follow_the_published_formula(
    recompute: Recompute, sequence: bool, expected: float
) -> None:
    """arXiv 2205.05198: s b h (34 + 5 a s / h) without parallelism, 34 s b h without the scores, 2 s b h with full
    recomputation, all divided by the tensor size under sequence parallelism."""
    tensor = 8 if sequence else 1
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    work = Workload(GPT_22B, 2048, 4, 4, parallel, 1, "bf16", recompute, MEGATRON)
    kept = layer_activations(work).kept
    assert kept == pytest.approx(expected * 2048 * 4 * 6144 / tensor, rel=1e-9)


def test_175b_in_an_interleaved_pipeline_keeps_the_published_activations() -> None:
    """arXiv 2205.05198, figure 7: 66.8 GiB of activations on the first of 8 ranks of 3 chunks."""
    model = replace(GPT_22B, num_layers=96, hidden_size=12288, ffn_hidden_size=49152, num_attention_heads=96)
    parallel = ParallelConfig(tensor=8, pipeline=8, virtual_pipeline=3)
    work = Workload(model, 2048, 64, 1, parallel, 1, "bf16", "none", MEGATRON)
    assert rank_memory(work, 0).activations / GIB == pytest.approx(66.8, rel=0.005)


def one_by_one(rank: int, pipeline: int, micro_batches: int, chunk_bytes: list[float]) -> list[float]:
    """The schedule played pass by pass, with what waits before a backward pass of each chunk: an oracle for the closed
    form."""
    chunks = len(chunk_bytes)
    total = chunks * micro_batches
    warmup = pipeline - rank - 1 if chunks == 1 else 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
    warmup = min(warmup, total)
    held, peaks = 0.0, [0.0] * chunks
    for step in range(total + warmup):
        if step < total:
            held += chunk_bytes[step // pipeline % chunks]
        if step >= warmup:
            chunk = chunks - 1 - (step - warmup) // pipeline % chunks
            peaks[chunk] = max(peaks[chunk], held)
            held -= chunk_bytes[chunk]
    assert held == pytest.approx(0)
    return peaks


def test_in_flight_activations_are_those_of_a_schedule_played_pass_by_pass() -> None:
    chance = random.Random(3)
    for _ in range(100):
        pipeline, chunks = chance.randint(1, 6), chance.randint(1, 4)
        micro_batches = pipeline * chance.randint(1, 6)
        sizes = [float(chance.randint(1, 9)) for _ in range(chunks if pipeline > 1 else 1)]
        rank = chance.randrange(pipeline)
        expected = one_by_one(rank, pipeline, micro_batches, sizes)
        assert in_flight(rank, pipeline, micro_batches, sizes) == pytest.approx(expected)


def test_the_worst_rank_is_found_without_looking_at_all() -> None:
    layouts: list[dict[str, Any]] = [
        {"pipeline": 8},
        {"pipeline": 4, "virtual_pipeline": 4},
        {"tensor": 2, "pipeline": 7},
    ]
    for sizes in layouts:
        work = workload(**sizes)
        assert worst_memory(work).total == max(memory.total for memory in all_rank_memory(work))


def test_the_allowance_is_the_drivers_share_and_a_part_of_what_moves() -> None:
    plain, allowed = rank_memory(workload(), 0), rank_memory(workload(), 0, context_gib=2, fragmentation=0.1)
    assert allowed.total - plain.total == pytest.approx(2 * GIB + 0.1 * (plain.activations + plain.working))


@pytest.mark.usefixtures("choice_of_before")
@pytest.mark.parametrize("asked", ["auto", "fused", "separate"])
@pytest.mark.parametrize(("tokens", "vocab"), [(2048, 131_072), (2047, 131_072), (16_384, 16_000), (4096, 81_920)])
def test_the_planned_head_is_the_one_that_runs(
    asked: Literal["auto", "fused", "separate"], tokens: int, vocab: int
) -> None:
    """Whether head and loss are one operation, and the tokens of its chunks, as the kernels decide it."""
    wanted = KernelsConfig(head_and_loss=asked)
    model, parallel = replace(TELE_FLM, vocab_size=vocab), ParallelConfig(tensor=2)
    work = Workload(model, tokens, 1, 1, parallel, 1, implementation=as_chosen(CUDA, wanted))
    hidden = torch.empty(tokens, 1, model.hidden_size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(work.padded_vocab // 2, model.hidden_size, dtype=torch.bfloat16, device="meta")
    kernels.use(kernels.choose(wanted, "cuda"))
    assert fuses_head(work) == kernels.fuses_head_and_loss(hidden, weight)
    assert fuses_head(work) == kernels.fuses_head_and_loss(hidden[: tokens // 2], weight, 2) or tokens % 2
    if fuses_head(work):
        assert head_tokens(work) == min(tokens, linear_loss._chunk_tokens(hidden.view(tokens, -1), weight))


def test_replicas_that_load_hold_what_one_reads_and_what_another_sends() -> None:
    """Two regions of at most 32 MiB beside weights, gradients and optimizer, where a step needs less."""
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2, vocab_size=80_000)
    parallel = ParallelConfig(pipeline=2, distributed_optimizer=False)
    work = Workload(model, 128, 8, 1, parallel, 2, precision="fp32", recompute="full")
    alone, together = rank_memory(replace(work, data=1), 0), rank_memory(work, 0)
    held = together.weights + together.gradients + together.optimizer
    assert together.total == pytest.approx(held + 2 * 4 * work.embedding_parameters)
    assert alone.total < together.total
    bf16 = rank_memory(replace(work, model=replace(model, vocab_size=800_000), precision="bf16"), 0)
    assert bf16.total - (bf16.weights + bf16.gradients + bf16.optimizer) < 128 * 2**20


def test_a_z_loss_keeps_the_logits() -> None:
    large = StageConfig(model=TELE_FLM, micro_batch=8, global_batch=8)
    penalised = replace(large, stability=replace(large.stability, z_loss=1e-4))
    kept, none = (stage_workload(stage, 4096, 1) for stage in (penalised, large))
    assert fuses_head(none) and not fuses_head(kept)
    whole = 8 * 4096 * 81_920 * 2  # bytes of logits
    assert head_activations(kept) - head_activations(none) > 0.8 * whole


@pytest.mark.parametrize(("data", "more"), [(1, False), (512, True)])
def test_building_the_model_can_hold_more_than_a_step(data: int, more: bool) -> None:
    """With many replicas, which share the optimizer: weights lie beside the buffers that they go into."""
    memory = rank_memory(workload(data=data, tensor=4, pipeline=8), 0)
    building = 2 * memory.weights + memory.gradients
    assert memory.total >= building
    assert (memory.total == pytest.approx(building)) is more
