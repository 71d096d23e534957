"""Ranks meet once in a step and the host waits once: counted in real steps, and what they tell each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.distributed.world import layout
from flm_megatron.training.world_sums import Told, WorldSums, sum_over_world
from tests.support.layouts import STAGE, micro_batches, synthetic_batch, train_state_under
from tests.support.pool import Pool

READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
STEP = replace(STAGE, model=replace(STAGE.model, num_layers=4))
CASES = [
    (ParallelConfig(data=2), "bf16"),
    (ParallelConfig(data=2, distributed_optimizer=False), "fp32"),
    # Without sequence parallelism, under which the engine compares states of the host's generator: values of the host.
    pytest.param(ParallelConfig(tensor=2, data=1), "fp32", marks=pytest.mark.slow),
    (ParallelConfig(pipeline=2, virtual_pipeline=2, data=1), "bf16"),
]
SQUARES: list[tuple[list[list[float]] | None, float]] = [
    (None, 0.0),
    ([[9.0], [16.0]], 5.0),  # ranks share one sum
    ([[9.0, 0.0], [0.0, 9.0]], 3.0),  # replicas that agree
    ([[9.0, 0.0], [0.0, 16.0]], 4.0),  # one of them is corrupt
    ([[9.0, 0.0], [0.0, math.nan]], math.nan),
    ([[math.nan, 0.0], [0.0, 9.0]], math.nan),
    ([[math.inf], [9.0]], math.inf),
    ([[2.0**24], [1.0]], 2.0**12),  # fp32 numbers, added up in more places and rounded once
]


class WholeReads(TorchFunctionMode):
    """Counts the calls that read a whole tensor to the host, which no operation of torch tells."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run and count."""
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts reads of single values, and collectives of the world."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        """Run and count."""
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts["value"] += 1
        if func.namespace == "c10d" and func._opname not in ("send", "recv_"):
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            world = dist.group.WORLD
            self.counts[func._opname] += world is not None and group.group_name == world.group_name
        return func(*args, **(kwargs or {}))


def counted(parallel: ParallelConfig, precision: str) -> tuple[int, dict[str, int]]:
    """Reads of tensors, and of values and collectives of the world by operation, in a rank's second step."""
    with train_state_under(parallel, replace(STEP, precision=precision)) as state:  # type: ignore[arg-type]
        vocab, micro = STEP.model.vocab_size or 0, state.stage.micro_batch
        first, second = (micro_batches(synthetic_batch(step, vocab), micro) for step in (0, 1))
        state.train_step(first)
        with WholeReads() as reads, Operations() as operations:
            state.train_step(second)
        return reads.count, {key: count for key, count in operations.counts.items() if count}


@pytest.mark.parametrize(("parallel", "precision"), CASES)
def test_a_step_meets_once_and_waits_once(pool: Pool, parallel: ParallelConfig, precision: str) -> None:
    assert pool.run(2, counted, parallel, precision) == [(1, {"allreduce_": 1})] * 2


def told() -> list[WorldSums]:
    """The sums of ranks of which each gives losses, flags and squares of its own."""
    rank = dist.get_rank()
    outputs = [torch.tensor([2.0 + rank, 3.0], dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)]
    with layout(ParallelConfig(data=2), timeout_s=120):
        return [sum_over_world(outputs, Told(stop=rank == 1), share(shares, rank)) for shares, _ in SQUARES]


def share(shares: list[list[float]] | None, rank: int) -> torch.Tensor | None:
    """What one rank gives."""
    return None if shares is None else torch.tensor(shares[rank], dtype=torch.float64)


def test_all_ranks_hear_the_same(pool: Pool) -> None:
    for rank in pool.run(2, told):
        for sums, (_, norm) in zip(rank, SQUARES, strict=True):
            assert (sums.loss, sums.tokens, sums.heard) == (6.0, 14, Told(stop=True))
            assert sums.grad_norm == pytest.approx(norm, rel=0, abs=0, nan_ok=True)
