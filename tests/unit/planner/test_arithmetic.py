"""Parts of a plan worked out by hand, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.config.schema import CheckpointConfig, ModelConfig, ParallelConfig
from flm_megatron.planner.cost.activations import layer_activations, residual_bytes, stream_bytes
from flm_megatron.planner.cost.communication import data_time, pipeline_time, tensor_time
from flm_megatron.planner.cost.compute import layer_passes
from flm_megatron.planner.cost.matmul import matmul_time
from flm_megatron.planner.cost.memory import rank_memory
from flm_megatron.planner.cost.throughput import chunk_passes, step_time
from flm_megatron.planner.goodput import plan_goodput
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import find_machine
from flm_megatron.planner.plan import StagePlan, cost

MODEL = ModelConfig(num_layers=8, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, vocab_size=32768)
A800 = find_machine("a800")


def workload(data: int = 1, batch: int = 16, **layout: Any) -> Workload:
    """A step of `batch` samples of 2,048 tokens."""
    return Workload(MODEL, 2048, batch, 1, ParallelConfig(**layout), data)


def exactly(value: float) -> object:
    """Equal but for rounding."""
    return pytest.approx(value, rel=1e-12)


def test_a_pass_begins_with_one_stream_and_with_four_when_others_are_under_way() -> None:
    stream = 2048 * 1024 * 2
    assert rank_memory(workload(), 0).buffers == stream
    assert rank_memory(workload(pipeline=2), 0).buffers == stream
    assert rank_memory(workload(pipeline=2, virtual_pipeline=2), 0).buffers == 4 * stream
    split = workload(tensor=2, pipeline=2, sequence=True)
    assert rank_memory(split, 0).buffers == stream + stream / 2  # the gathered stream, and a half


def test_a_gated_layer_keeps_gate_up_and_their_product() -> None:
    wide = replace(MODEL, ffn_hidden_size=2 * 2816)
    narrow, doubled = (layer_activations(replace(workload(), model=model)).kept for model in (MODEL, wide))
    assert doubled - narrow == 3 * 2048 * 2816 * 2
    apart = replace(workload().implementation, fused_activation=False)
    works = [replace(workload(), model=model, implementation=apart) for model in (MODEL, wide)]
    assert layer_activations(works[1]).kept - layer_activations(works[0]).kept == 5 * 2048 * 2816 * 2


def test_a_thin_product_in_fp32_moves_four_bytes_a_value() -> None:
    machine = find_machine("h100")
    machine = replace(machine, efficiency=replace(machine.efficiency, tile_overhead=0.0))
    values = 8192 * 8 + 8 * 8192 + 8192 * 8192
    bandwidth = machine.hardware.bandwidth_gb_per_s * 1e9 * machine.efficiency.memory
    assert matmul_time(machine, "fp32", 8192, 8192, 8) == exactly(4 * values / bandwidth)


def test_exchanges_are_hidden_as_far_as_the_weight_gradients_reach() -> None:
    work = workload(tensor=8, sequence=True)
    exchange = tensor_time(work, A800, stream_bytes(work))
    slow = replace(A800, intra_gb_per_s=A800.intra_gb_per_s / 1e6)  # nothing is hidden
    slow_exchange = tensor_time(work, slow, stream_bytes(work))
    passes = layer_passes(work, slow).backward
    assert passes.tensor == pytest.approx(6 * slow_exchange, rel=1e-3)  # three for each of two pairs of matrices
    fast = replace(A800, intra_gb_per_s=A800.intra_gb_per_s * 1e3)  # only what stands alone is seen
    assert layer_passes(work, fast).backward.tensor == exactly(2 * tensor_time(work, fast, stream_bytes(work)))
    assert layer_passes(work, A800).forward.tensor == exactly(4 * exchange)


def test_a_plain_schedule_waits_for_an_exchange_with_each_neighbour_per_micro_batch() -> None:
    """One more to receive the first, and where the slowest rank is not at an end two to send the last back."""
    ends, middle = workload(pipeline=2), workload(pipeline=4, pipeline_layers=[1, 3, 3, 1])
    transfer = pipeline_time(ends, A800, residual_bytes(ends))
    assert step_time(ends, A800).pipeline == exactly((1 + 16) * transfer)
    assert step_time(middle, A800).pipeline == pytest.approx((1 + 2 * 16) * transfer, rel=0.15)


def test_an_interleaved_schedule_waits_for_what_a_chunk_does_not_hide() -> None:
    work = workload(pipeline=2, virtual_pipeline=2)
    hidden = step_time(work, A800)
    assert hidden.pipeline == exactly(6 * pipeline_time(work, A800, residual_bytes(work)))  # of warm-up and flush
    slow = replace(A800, intra_gb_per_s=1e-3)
    transfer = pipeline_time(work, slow, residual_bytes(work))
    # Both directions of both chunks at once: all but the passes beside them is waited for.
    assert step_time(work, slow).pipeline == pytest.approx((2 * 16 + 4) * transfer, rel=1e-3)


def test_overlap_hides_gradients_of_a_pipeline_rank_behind_the_last_backward_passes_of_those_before_it() -> None:
    layout: dict[str, Any] = {"pipeline": 3, "pipeline_layers": [1, 5, 2]}
    plain = workload(data=8, **layout)
    hidden = workload(data=8, overlap_grad_reduce=True, **layout)
    slow = replace(A800, inter_gb_per_s=1e-2, intra_gb_per_s=1e-2)
    parameters = max(plain.rank_parameters(rank) for rank in range(3))
    reduce = data_time(plain, slow, 4.0 * parameters)
    backward = chunk_passes(plain, slow).layer.backward.total
    # The middle rank has most to reduce; when it begins the first one still has its one layer to go back through.
    assert reduce > 5 * backward
    assert step_time(plain, slow).data - step_time(hidden, slow).data == pytest.approx(backward)


def stage_plan(gpus: int) -> StagePlan:
    """A stage of 1,000 steps of a second."""
    work = workload(data=gpus)
    step = step_time(work, A800)
    plan = StagePlan("s", work, 10**9, [], step, 0.0, 0.0, 1000, cost(A800, gpus, 1.0, 1.0))
    return plan


def test_saves_take_the_storage_or_only_the_copy_to_the_host() -> None:
    machine = replace(A800, storage_gb_per_s=7.0, host_gb_per_s=14.0, restart_s=60.0)
    stage = stage_plan(4)
    (waits,) = plan_goodput([stage], CheckpointConfig(interval_steps=10), machine, 4, 100.0)
    assert waits.reliability.mtbf_s == 25 * 3600 and waits.reliability.restart_s == 60
    assert waits.reliability.stall_s == waits.reliability.save_s == exactly(2.0)  # 14 GB at 7 GB/s
    (beside,) = plan_goodput([stage], CheckpointConfig(asynchronous=True), machine, 4, 100.0)
    assert beside.reliability.stall_s == exactly(0.25)  # a quarter of 14 GB at 14 GB/s
    assert beside.reliability.save_s == exactly(2.25)
    assert waits.configured_steps == 10 and beside.configured_steps is None
    assert beside.goodput(None) == beside.reliability.goodput(beside.train_s)
    assert waits.goodput(10) == exactly(waits.reliability.goodput(10 * stage.step.total))


def test_what_a_better_restart_is_worth_is_the_wall_time_it_spares() -> None:
    (plan,) = plan_goodput([stage_plan(4)], CheckpointConfig(), A800, 4, 1.0)
    better = replace(plan, reliability=replace(plan.reliability, restart_s=0.0))
    walls = [each.train_s / each.goodput(each.best_steps) for each in (plan, better)]
    assert plan.saved_gpu_hours(restart_s=0.0) == exactly(4 * (walls[0] - walls[1]) / 3600)
    assert plan.saved_gpu_hours(restart_s=0.0) > 0
