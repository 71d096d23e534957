"""Layout search: what fits, what does not and why, and the smallest number of accelerators."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from flm_megatron.config.rules.layout import LAYOUT_RULES
from flm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.planner.cost.memory import GIB, worst_memory
from flm_megatron.planner.cost.throughput import step_time
from flm_megatron.planner.feasibility import require_candidates, require_fit
from flm_megatron.planner.layout import stage_workload
from flm_megatron.planner.machine import find_machine
from flm_megatron.planner.plan import plan_run, plan_stage
from flm_megatron.planner.search import MEMORY, search, smallest_fit

A800, H100 = find_machine("a800"), find_machine("h100")
SEVEN_B = StageConfig(
    name="7b",
    model=ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000),
    global_batch=64,
    tokens=1_000_000,
    precision="bf16",
)
SEQUENCE = 4096


def test_every_layout_is_fitting_or_rejected_and_all_that_fit_can_run() -> None:
    result = search(SEVEN_B, SEQUENCE, A800, 16)
    assert result.candidates
    assert result.rejections[MEMORY].count > 0
    for candidate in result.candidates:
        work = candidate.work
        assert work.recompute != "attention"
        stage = replace(SEVEN_B, parallel=work.parallel, micro_batch=work.micro_batch, recompute=work.recompute)
        assert not any(rule(stage, SEQUENCE, 16) for rule in LAYOUT_RULES)
        assert work.world_size == 16
        assert candidate.memory_gib <= A800.hardware.memory_gib


def test_a_model_without_layers_is_planned_without_a_pipeline() -> None:
    bare = replace(SEVEN_B, model=replace(SEVEN_B.model, num_layers=0))
    found = search(bare, SEQUENCE, A800, 16).candidates
    assert found and {each.work.parallel.pipeline for each in found} == {1}
    whole = [each.work for each in found if each.work.parallel.tensor == 1]
    assert whole and all(work.rank_parameters(0) == 2 * 32000 * 4096 + 4096 for work in whole)
    fit = smallest_fit(bare, SEQUENCE, A800)
    assert fit is not None and fit.world_size == 1


def test_layouts_are_ranked_by_the_time_that_a_plan_gives_them() -> None:
    candidates = search(SEVEN_B, SEQUENCE, A800, 16).candidates
    times = [candidate.step.total for candidate in candidates]
    assert times == sorted(times)
    best = candidates[0].work
    assert best.recompute != "attention"
    stage = replace(SEVEN_B, parallel=best.parallel, micro_batch=best.micro_batch, recompute=best.recompute)
    assert plan_stage(stage, SEQUENCE, A800, 16).step.total == times[0]


def test_the_estimate_of_a_step_is_close_or_too_long() -> None:
    """Layers are split evenly over 8 ranks, and not over 12."""
    for gpus, close in ((8, True), (12, False)):
        stage = replace(SEVEN_B, global_batch=24, recompute="full")
        chunks = [1, 2, 4] if close else [1]
        for parallel in (ParallelConfig(pipeline=gpus, virtual_pipeline=count) for count in chunks):
            work = stage_workload(replace(stage, parallel=parallel), SEQUENCE, gpus)
            ratio = step_time(work, A800, simulate=False).total / step_time(work, A800).total
            assert 0.98 < ratio < (1.02 if close else 1.1), (work, ratio)
            assert close or ratio > 1.01, (work, ratio)


def test_fp8_casts_weights_once_a_step_in_every_layout() -> None:
    """So a micro-batch costs less where there are more of them, and a single one keeps no casts in memory."""
    stage = replace(SEVEN_B, fp8="tensorwise")
    result = search(stage, SEQUENCE, H100, 32)
    for candidate in result.candidates:
        assert candidate.step.compute == step_time(candidate.work, H100, simulate=False).compute, candidate.work
    two, one = (stage_workload(replace(stage, micro_batch=size, recompute="full"), SEQUENCE, 32) for size in (1, 2))
    assert worst_memory(one).total < worst_memory(two).total
    between = (worst_memory(one, H100.context_gib, H100.fragmentation).total + GIB) / GIB
    tight = replace(H100, hardware=replace(H100.hardware, memory_gib=between))
    assert any(candidate.work == one for candidate in search(stage, SEQUENCE, tight, 32).candidates)


def test_rejections_are_grouped_with_an_example() -> None:
    rejections = search(SEVEN_B, SEQUENCE, A800, 24).rejections
    batch = next(item for reason, item in rejections.items() if "whole micro-batches" in reason)
    assert "global_batch 64 does not divide" in batch.example
    assert all(item.count > 0 and item.example for item in rejections.values())


def test_the_nearest_layout_that_does_not_fit_is_named() -> None:
    large = replace(SEVEN_B, model=replace(SEVEN_B.model, num_layers=320))
    nearest = search(large, SEQUENCE, A800, 16).rejections[MEMORY]
    assert A800.hardware.memory_gib < nearest.nearest_gib < 100


def test_the_smallest_number_fits_and_no_smaller_one_does() -> None:
    large = replace(SEVEN_B, model=replace(SEVEN_B.model, num_layers=160))
    smallest = smallest_fit(large, SEQUENCE, A800)
    assert smallest is not None
    assert search(large, SEQUENCE, A800, smallest.world_size).candidates
    for gpus in range(1, smallest.world_size):
        if gpus < A800.node_size or gpus % A800.node_size == 0:
            assert not search(large, SEQUENCE, A800, gpus).candidates, gpus


def test_a_number_that_no_layout_fits_is_refused_with_the_smallest_that_does() -> None:
    large = replace(SEVEN_B, model=replace(SEVEN_B.model, num_layers=160))
    smallest = smallest_fit(large, SEQUENCE, A800)
    assert smallest is not None
    with pytest.raises(RequestError, match=rf"GiB, .* too many; the smallest .* is {smallest.world_size} \(tensor"):
        require_candidates(large, SEQUENCE, A800, 2, search(large, SEQUENCE, A800, 2))


def test_a_stage_that_fits_nowhere_is_refused_in_one_line() -> None:
    wide = ModelConfig(
        num_layers=1, hidden_size=2**18, ffn_hidden_size=2**20, num_attention_heads=2, head_dim=2**17, vocab_size=1000
    )
    stage = replace(SEVEN_B, model=wide)
    with pytest.raises(RequestError, match="cannot fit on a800 under any layout of any number") as caught:
        require_candidates(stage, SEQUENCE, A800, 8, search(stage, SEQUENCE, A800, 8))
    assert "\n" not in str(caught.value)


def test_a_run_whose_layout_overfills_is_refused_with_one_that_fits() -> None:
    run = RunConfig(stages=[replace(SEVEN_B, parallel=ParallelConfig())])
    run = replace(run, data=replace(run.data, sequence_length=SEQUENCE))
    with pytest.raises(RequestError, match=r"pipeline rank 0 needs .* GiB, a800 has 79.2; fits with tensor"):
        require_fit(run, plan_run(run, A800, 2))


def test_a_trillion_parameters_on_896_need_seconds() -> None:
    """Ten of the processor's seconds, which other processes do not lengthen."""
    model = ModelConfig(
        num_layers=140, hidden_size=20480, ffn_hidden_size=98304, num_attention_heads=160, vocab_size=80000
    )
    stage = replace(SEVEN_B, model=model, global_batch=1792)
    start = time.process_time()
    result = search(stage, SEQUENCE, A800, 896)
    assert time.process_time() - start < 10
    assert len(result.candidates) > 100


def test_memory_falls_with_data_ranks_as_the_smallest_fit_takes_for_granted() -> None:
    totals = [worst_memory(stage_workload(SEVEN_B, SEQUENCE, world)).total for world in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
