"""Layouts leave nothing behind: their process groups, with sockets and threads, end with them."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.distributed.local_processes import run_processes
from flm_megatron.distributed.world import Layouts, layout
from flm_megatron.errors import FlmError
from flm_megatron.launch import run as launch
from flm_megatron.launch.preflight import resolve
from tests.support.layouts import all_layouts, take_steps, train_state_under
from tests.support.pool import Pool
from tests.support.runs import make_data, make_run


def held() -> tuple[int, int, int, int]:
    """Process groups, modules, open files (sockets too) and threads of this process."""
    gc.collect()
    process = psutil.Process()
    modules = sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())
    return len(_world.pg_map), modules, process.num_fds(), process.num_threads()


def six_layouts() -> list[tuple[int, int, int, int]]:
    """What is held after each of six layouts in which a step is taken."""
    layouts = [parallel for parallel in all_layouts(dist.get_world_size()) if not parallel.sequence][:6]
    found = []
    for parallel in (layouts * 6)[:6]:
        with train_state_under(parallel) as state:
            take_steps(state, range(1))
            del state
        dist.barrier()  # a rank that is already in the next layout has sockets to those that are not
        found.append(held())
        dist.barrier()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_six_layouts_hold_no_more_than_two(pool: Pool, world: int) -> None:
    for counts in pool.run(world, six_layouts):
        groups, modules, files, threads = zip(*counts, strict=True)
        assert groups == (1,) * 6
        assert modules == (0,) * 6
        assert max(files[2:]) <= files[1] + 2, files
        assert max(threads[2:]) <= threads[1], threads


def groups_of_a_layout() -> tuple[int, int, set[timedelta], bool]:
    """Groups beside the world's and their sets of ranks, their timeouts, and whether the next layout is the same."""
    layouts = Layouts(timeout_s=95)
    with layouts(ParallelConfig(tensor=2)):
        groups = [group for group in _world.pg_map if group is not dist.group.WORLD]
        sets = {tuple(dist.get_process_group_ranks(group)) for group in groups}
        timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    with layouts(ParallelConfig(tensor=2, data=2)):
        kept = set(groups) < set(_world.pg_map)
    with layouts(ParallelConfig(pipeline=2)):
        kept &= not set(groups) & set(_world.pg_map)
    return len(groups), len(sets), timeouts, kept


def test_one_group_for_each_set_of_ranks_with_the_timeout_asked_for(pool: Pool) -> None:
    for groups, sets, timeouts, kept in pool.run(4, groups_of_a_layout):
        assert groups == sets == 4
        assert timeouts == {timedelta(seconds=95)}
        assert kept


def fail_inside() -> int:
    """Rank 1 fails inside a layout while rank 0 waits for it there, and is slow to say so."""
    try:
        with layout(ParallelConfig(tensor=2), timeout_s=60):
            if dist.get_rank() == 1:
                raise ValueError("planted")
            dist.all_reduce(torch.ones(1))
    except ValueError:
        time.sleep(0.5)  # were its groups gone now, rank 0 would fail first, and with a word about connections
        raise
    return 0


def test_a_rank_that_fails_inside_a_layout_is_the_one_that_is_heard() -> None:
    began = time.monotonic()
    with pytest.raises(FlmError, match=r"(?s)rank 1: .*ValueError: planted"):
        run_processes(2, fail_inside, ())
    assert time.monotonic() - began < 30


def test_a_local_run_has_the_run_files_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []

    def instead(*arguments: Any) -> int:
        given.append(arguments)
        return 3

    monkeypatch.setattr(launch, "run_processes", instead)
    options = ("--distributed.timeout_s", "95")
    run = resolve(make_run(make_data(tmp_path), tmp_path / "run", *options)[1])
    assert launch.train(run) == 3
    assert given[0][3] == 95
