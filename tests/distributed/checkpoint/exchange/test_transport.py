"""Regions sent between real processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.description import Held
from flm_megatron.checkpoint.exchange.transport import agreed_plan, exchange
from flm_megatron.checkpoint.logical import Region
from tests.support.pool import Pool


def columns_to_rows() -> tuple[int, int, int, int]:
    """Columns of a matrix, on two ranks, become rows on four, twice by one plan; returns bytes, messages, rounds."""
    rank = dist.get_rank()
    for seed in range(2):
        matrix = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
        held: list[Held] = [("m", Region((0, 3 * rank), (64, 3)), matrix[:, 3 * rank :][:, :3])] if rank < 2 else []
        places = [torch.empty(8, 6, dtype=torch.float64 if rank == 3 else torch.float32) for _ in range(2)]
        wanted = [("m", Region((16 * rank + 8 * n, 0), (8, 6)), place) for n, place in enumerate(places)]
        if seed == 0:
            plan = agreed_plan(held, [[(name, region)] for name, region, _ in wanted], round_bytes=200)
        moved = exchange(held, wanted, plan)
        assert torch.equal(torch.cat(places), matrix[16 * rank : 16 * rank + 16].to(places[0].dtype))
        assert moved.seconds > 0
    return moved.sent, moved.received, moved.messages, plan.traffic.rounds


def test_columns_become_rows_bit_for_bit(pool: Pool) -> None:
    """Each of the first two ranks keeps its half of its own rows and sends the rest."""
    found = pool.run(4, columns_to_rows)
    halves = [[8 * 3 * 4 * 2 * others for others in line] for line in ((3, 1), (3, 1), (0, 2), (0, 2))]
    assert [list(line[:2]) for line in found] == halves
    assert all(line[2] == 2 * 3 * (rank < 2) for rank, line in enumerate(found)), "one message for each round and peer"
    assert {line[3] for line in found} == {found[0][3]} and found[0][3] > 2
