"""Seconds of what a rank does: beside the planner's cost model, and beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig
from flm_megatron.kernels.choice import using
from flm_megatron.planner.cost.communication import gather_time
from flm_megatron.planner.cost.matmul import attention_time, matmul_time, memory_time
from flm_megatron.planner.machine import find_machine
from flm_megatron.planner.rehearsal.recorder import Recorder
from flm_megatron.planner.rehearsal.timing.operation_times import OperationTimes
from flm_megatron.planner.rehearsal.timing.timeline import Segment, Timeline
from flm_megatron.planner.rehearsal.world import rehearsed_world
from flm_megatron.planner.simulation.events import Collective, Join, Meet

A800 = replace(find_machine("a800"), spread=0.0)
BF16 = torch.bfloat16


def timed(work: Callable[[], object], tensor: int = 16, stage_ranks: int = 64, world: int = 64) -> Segment:
    """What rank 0 of a world does, in which tensor groups span nodes unless said otherwise."""
    timeline = Timeline(OperationTimes(A800), tensor, stage_ranks, world)
    recorder, fake = Recorder(), FakeTensorMode(allow_non_fake_inputs=True)
    with rehearsed_world(0, world), using(kernels.choose(KernelsConfig())), fake, recorder, recorder.timing(timeline):
        work()
    (segment,) = timeline.segments
    return segment


def test_products_take_what_is_planned_by_their_shapes() -> None:
    rows, weight = (torch.empty(shape, dtype=BF16, device="meta") for shape in ((4096, 8192), (1024, 8192)))

    def work() -> None:
        """A layer, and the gradients of its input and its weight."""
        read, matrix = (torch.empty(like.shape, dtype=BF16) for like in (rows, weight))
        grad = read @ matrix.t()
        grad @ matrix
        kernels.add_weight_gradient_(torch.empty(weight.shape), read, grad)

    found = timed(work)
    sizes = [(4096, 1024, 8192), (4096, 8192, 1024), (1024, 8192, 4096)]
    assert found.spent["matmul"] == pytest.approx(sum(matmul_time(A800, "bf16", *size) for size in sizes))
    assert found.spent["memory_bound"] == pytest.approx(memory_time(A800, 6 * 1024 * 8192))


@pytest.mark.parametrize(("causal", "keys", "share"), [(True, 2048, 1 / 2), (False, 2048, 1.0), (True, 512, 7 / 32)])
def test_attention_takes_the_arithmetic_that_causality_leaves(causal: bool, keys: int, share: float) -> None:
    def work() -> None:
        """Attention and its gradient."""
        query, key, value = (torch.empty(1, 8, n, 128, dtype=BF16, requires_grad=True) for n in (2048, keys, keys))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        torch.autograd.grad(out, query, torch.empty_like(out))

    product = share * 2 * 8 * 2048 * 2048 * 128
    assert timed(work).spent["attention"] == pytest.approx(attention_time(A800, "bf16", (2 + 5) * product))


def test_other_kernels_take_the_bytes_that_they_move_and_views_nothing() -> None:
    mib = 2**20
    for name, work, moved in (
        ("add", lambda: torch.empty(64 * mib) + torch.empty(64 * mib), 3 * 256),
        ("add_", lambda: torch.empty(64 * mib).add_(torch.empty(64 * mib, dtype=BF16)), 2 * 256 + 128),
        ("zero_", lambda: torch.empty(64 * mib).zero_(), 256),
        ("copy_", lambda: torch.empty(64 * mib).copy_(torch.empty(64 * mib, dtype=BF16)), 256 + 128),
        ("view", lambda: torch.empty(64 * mib).view(64, -1).t()[1:].detach(), 0),
    ):
        assert timed(work).spent["memory_bound"] == pytest.approx(memory_time(A800, moved * mib)), name


def test_triton_kernels_take_the_bytes_of_their_tensors_once() -> None:
    timeline = Timeline(OperationTimes(A800), 1, 1, 1)
    whole = torch.empty(2 * 2**20, device="meta")
    first, second = whole.chunk(2)
    timeline.launched([first, second, first])
    assert timeline.segments[0].spent["memory_bound"] == pytest.approx(memory_time(A800, whole.nbytes))


def test_a_collective_beside_a_product_is_exposed_as_far_as_it_is_longer() -> None:
    whole = 4096 * 20480 * 2

    def work(beside: bool) -> None:
        """Gather over the tensor group, and multiply."""
        rows, weight = torch.empty(4096, 4096, dtype=BF16), torch.empty(4096, 4096, dtype=BF16)
        gathered, part = torch.empty(4096, 20480, dtype=BF16), torch.empty(256, 20480, dtype=BF16)
        group = dist.new_group(range(16))
        handle = dist.all_gather_into_tensor(gathered, part, group=group, async_op=beside)
        rows @ weight
        if beside:
            assert handle is not None
            handle.wait()

    gather, product = gather_time(A800, whole, 16, 8), matmul_time(A800, "bf16", 4096, 4096, 4096)
    assert gather > 0 and product > 0
    for beside, exposed in ((True, max(0.0, gather - product)), (False, gather)):
        alone = timed(lambda beside=beside: work(beside)).alone  # type: ignore[misc]
        assert alone.ranks[0].get("tensor", 0.0) == pytest.approx(exposed)
        assert alone.seconds == pytest.approx(product + exposed)


def test_groups_are_told_apart_by_where_their_ranks_lie() -> None:
    def work() -> None:
        """Reduce over the tensor group, the data group and all ranks."""
        for ranks in (range(4), range(0, 8, 4), range(16)):
            dist.all_reduce(torch.empty(8), group=dist.new_group(ranks))

    tasks = timed(work, tensor=4, stage_ranks=8, world=16).tasks
    streams = [task.stream for task in tasks if isinstance(task, Collective | Join | Meet)]
    assert streams == ["tensor", "tensor", "data", "data", "model"]  # started, waited for; all ranks meet
