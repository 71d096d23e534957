"""The order of passes and transfers beside the engine's own, as rehearsed ranks run it."""

from __future__ import annotations

from collections import Counter

import pytest

from flm_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.simulation.schedule import Exchange, Pass, Schedule

BATCHED = ("send previous", "receive previous", "send next", "receive next")
ONE_BY_ONE = {
    0: ("send next", "receive previous", "send previous", "receive next"),
    1: ("receive previous", "send next", "receive next", "send previous"),
}
"""The order in which the engine starts the transfers of an exchange; one by one on ranks of even and odd numbers."""


def planned_transfers(schedule: Schedule, rank: int) -> list[tuple[str, int]]:
    """Kind and peer of every transfer of a rank."""
    order = BATCHED if schedule.chunks == 1 else ONE_BY_ONE[rank % 2]
    exchanges = (item for item in schedule.order(rank) if isinstance(item, Exchange))
    ends = (end.split() for exchange in exchanges for end in sorted(exchange.ends, key=order.index))
    beside = {"previous": (rank - 1) % schedule.pipeline, "next": (rank + 1) % schedule.pipeline}
    return [(kind, beside[side]) for kind, side in ends]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"),
    [
        pytest.param(3, 1, 4, id="1F1B"),
        pytest.param(3, 1, 1, id="fewer micro-batches than ranks", marks=pytest.mark.slow),
        pytest.param(3, 2, 6, id="interleaved"),
        pytest.param(3, 2, 3, id="interleaved, all of the first rank's in warm-up", marks=pytest.mark.slow),
        pytest.param(2, 3, 4, id="interleaved over two ranks", marks=pytest.mark.slow),
    ],
)
def test_transfers_come_as_the_engine_has_them(pipeline: int, virtual: int, micro_batches: int) -> None:
    model = ModelConfig(
        num_layers=pipeline * virtual, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, vocab_size=32
    )
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
    stage = StageConfig(model=model, parallel=parallel, global_batch=micro_batches, micro_batch=1, tokens=10**5)
    run = RunConfig(data=DataConfig(sequence_length=8), stages=[stage])
    schedule = Schedule(pipeline, micro_batches, virtual)
    for rank in range(pipeline):
        report = rehearse_rank(run, stage, rank, pipeline, micro_batches)
        found = [(transfer.kind, transfer.peer) for transfer in report.transfers if transfer.peer is not None]
        assert planned_transfers(schedule, rank) == found


@pytest.mark.parametrize(
    "schedule", [Schedule(1, 3), Schedule(4, 2), Schedule(4, 9), Schedule(2, 6, 2), Schedule(2, 6, 2, overlaps=False)]
)
def test_every_micro_batch_passes_every_chunk_forward_and_then_backward(schedule: Schedule) -> None:
    for rank in range(schedule.pipeline):
        passes = [item for item in schedule.order(rank) if isinstance(item, Pass)]
        assert set(Counter(passes).values()) == {1}
        assert len(passes) == 2 * schedule.micro_batches * schedule.chunks
        for done in passes:
            if done.backward:
                assert passes.index(done._replace(backward=False)) < passes.index(done)
