"""Regions sent between real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flm_megatron.api.refit import Refitted, _compared, _memory, refit
from flm_megatron.checkpoint.exchange.description import Held
from flm_megatron.checkpoint.exchange.refit import Refit
from flm_megatron.checkpoint.exchange.transport import agreed_plan, exchange
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.logical_hash import logical_hash
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.model.parameters import FINAL_NORM
from tests.support.checkpoint_cases import MODEL, run_of
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


def one_copy_differs(folder: str) -> str:
    """The final norm is on both ranks of a replica, and not right on the first: what is said of that."""
    source, ranks, cut = ConvertedCheckpoint(open_checkpoint(folder), optimizer=False), (0, 1), ParallelConfig(tensor=2)
    arrived = _memory(source, MODEL, ranks, cut)
    for name, region, tensor in arrived:
        tensor.copy_(source.read(name, region) + (dist.get_rank() == 0 and name == f"{FINAL_NORM}.weight"))
    with pytest.raises(DamagedError) as refused:
        _compared(source, arrived, ranks, cut)
    return str(refused.value)


def test_a_copy_that_arrived_otherwise_is_found(pool: Pool, tmp_path: Path) -> None:
    manifest = Manifest.from_json({"run": run_of(MODEL), "stage": "small", "step": 1})
    copy_checkpoint(InitialCheckpoint(MODEL, 3), tmp_path / "ours", manifest)
    for said in pool.run(2, one_copy_differs, str(tmp_path / "ours")):
        assert said == f"{FINAL_NORM}.weight: the weights that arrived in replica 0 are not the checkpoint's"


def pushed_to_others(folder: str) -> Refitted:
    """A checkpoint from four ranks to two replicas of another layout, on ranks in no order; one is left out."""
    here, there, cut = (5, 1, 0, 3), (2, 4), ParallelConfig(tensor=2, pipeline=2)
    os.environ.pop("WORLD_SIZE", None)  # a world of the caller's own making
    done = refit(folder, from_ranks=here, to_ranks=there, from_layout=cut, pushes=1)
    with pytest.raises(RequestError, match="tensor 3 x pipeline 1 does not divide 2 ranks"):
        refit(folder, from_ranks=here, to_ranks=there, to_layout=ParallelConfig(tensor=3))
    for ranks in ((), (0, 0), (-1,)):
        with pytest.raises(RequestError, match=r"--from-ranks is .* each once"):
            refit(folder, from_ranks=ranks, to_ranks=there)
    rank = dist.get_rank()
    values, place = torch.full((2, 3), 1.0), torch.zeros(2, 3, dtype=torch.bfloat16)
    region = Region((0, 0), (2, 3))
    again = Refit([("w", region, values)] if rank == 0 else [], [("w", region, place)] if rank == 6 else [])
    for number in (1.0, 2.5):
        values.fill_(number)
        again.push()
        assert (place == (number if rank == 6 else 0.0)).all()
    return done


def test_weights_are_pushed_to_other_ranks_under_another_layout_again_and_again(pool: Pool, tmp_path: Path) -> None:
    source = InitialCheckpoint(MODEL, 3)
    copy_checkpoint(source, tmp_path / "ours", Manifest.from_json({"run": run_of(MODEL), "stage": "small", "step": 1}))
    found = pool.run(7, pushed_to_others, str(tmp_path / "ours"))
    nbytes = sum(4 * Region.whole(info.shape).numel for info in source.tensors.values())
    for each in found:
        assert each.logical_hash == logical_hash(open_checkpoint(tmp_path / "ours"))
        assert [each.traffic.received[rank] for rank in range(7)] == [nbytes * (rank in (2, 4)) for rank in range(7)]
        assert sum(each.traffic.sent) == 2 * nbytes
