"""Rehearsed ranks beside real ones: what each sends, and what it holds, in the same order and to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron import kernels
from flm_megatron.config.schema import DataConfig, KernelsConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.rehearsal.recorder import Recorder
from tests.support.layouts import name
from tests.support.pool import Pool

SEQUENCE = 32
MODEL = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, vocab_size=500)
STAGE = StageConfig(model=MODEL, global_batch=8, micro_batch=1, precision="bf16")
TORCH = KernelsConfig(rms_norm="torch", swiglu="torch", rotary="torch", cross_entropy="torch", adamw="torch")
LAYOUTS = [
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
    ParallelConfig(pipeline=2, virtual_pipeline=2, data=2),
    ParallelConfig(tensor=2, data=2, overlap_grad_reduce=True, overlap_param_gather=True),
]
CASES = [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:3])]
Sent = list[tuple[str, tuple[int, ...], int, str, int | None]]


def sent(recorder: Recorder) -> Sent:
    """Transfers as far as they do not depend on who looks."""
    return [(t.kind, t.group, t.nbytes, t.dtype, t.peer) for t in recorder.transfers]


def real_step(stage: StageConfig) -> tuple[Sent, int]:
    """Transfers of a real rank's second step, and the bytes of its weights, gradients and optimizer."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.training.step import TrainState
    from tests.distributed.planner.test_memory import batches
    from tests.support.live_bytes import LiveBytes

    kernels.use(kernels.choose(TORCH))
    with layout(stage.parallel, timeout_s=120):
        state = TrainState(stage, SEQUENCE)
        samples = stage.global_batch // (stage.parallel.data or 1)
        state.train_step(batches(stage, SEQUENCE, samples))
        live = LiveBytes()
        live.count_existing()
        with Recorder(values=True) as recorder:
            state.train_step(batches(stage, SEQUENCE, samples))
        return sent(recorder), live.peak


@pytest.mark.parametrize("parallel", CASES, ids=name)
def test_a_rehearsed_rank_does_what_a_real_one_does(pool: Pool, parallel: ParallelConfig) -> None:
    stage = replace(STAGE, parallel=parallel)
    run = RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=[stage], kernels=TORCH)
    world = parallel.model_size * (parallel.data or 1)
    real = pool.run(world, real_step, stage)
    micro_batches = stage.global_batch // (parallel.data or 1)
    for rank, (transfers, held) in enumerate(real):
        report = rehearse_rank(run, stage, rank, world, micro_batches)
        rehearsed = [(t.kind, t.group, t.nbytes, t.dtype, t.peer) for t in report.transfers]
        assert rehearsed == transfers and rehearsed
        # The engine keeps some numbers beside these, such as the angles of positions, and CUDA's allocator rounds up.
        assert sum(report.steady.values()) == pytest.approx(held, abs=2**16)
