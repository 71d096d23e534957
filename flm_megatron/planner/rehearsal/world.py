"""A world of any size in one process: its groups are there, its other ranks are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flm_megatron.device import use
from flm_megatron.device.rehearsed import RehearsedDevice
from flm_megatron.engine.prepare import prepare


@contextmanager
def rehearsed_world(rank: int, size: int) -> Iterator[None]:
    """This process as rank `rank` of `size`, for the block; what other ranks would say is what this one says."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = use(RehearsedDevice())
    gather = dist.all_gather_object
    try:
        prepare()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        dist.all_gather_object = _gather_own  # type: ignore[assignment]
        yield
    finally:
        dist.all_gather_object = gather
        if dist.is_initialized():
            dist.destroy_process_group()
        use(before)


def _gather_own(found: list[object], own: object, group: dist.ProcessGroup | None = None) -> None:
    """In place of torch's: objects are pickled into tensors, which have no values here."""
    found[:] = [own] * len(found)
