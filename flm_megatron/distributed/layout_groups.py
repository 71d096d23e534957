"""The process groups of one layout: one for each set of ranks while it lasts, and none afterwards.

megatron-core asks for some 20 groups over 2 to 4 distinct sets of ranks, and `destroy_model_parallel` only forgets
them: each keeps its sockets and threads, on NCCL its buffers too. Groups of one set of ranks can share one: every rank
issues their communication in the same order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from flm_megatron.device import current


class LayoutGroups:
    """Makes groups in place of torch's `new_group`, and destroys those that it made."""

    def __init__(self, timeout: timedelta) -> None:
        """`timeout` applies to every group, whatever the engine asks for in whole minutes."""
        self._timeout = timeout
        self._make: Callable[..., dist.ProcessGroup] = dist.new_group
        self._made: list[dist.ProcessGroup] = []
        self._shared: dict[tuple[tuple[int, ...], str | None], dist.ProcessGroup] = {}

    def new_group(
        self, ranks: Sequence[int] | None = None, timeout: object = None, backend: str | None = None, **options: object
    ) -> dist.ProcessGroup:
        """Like torch's: the group of `ranks`, or a marker on ranks outside of it. All ranks of the world call."""
        members = tuple(sorted(range(dist.get_world_size()) if ranks is None else ranks))
        options = {name: value for name, value in options.items() if value}
        description = options.pop("group_desc", None)
        if options:  # a group that is set up in its own way is nobody else's
            return self._new(members, backend, group_desc=description, **options)
        key = (members, backend)
        if key not in self._shared:
            self._shared[key] = self._new(members, backend, group_desc=description)
        return self._shared[key]

    def _new(self, members: tuple[int, ...], backend: str | None, **options: object) -> dist.ProcessGroup:
        group = self._make(list(members), timeout=self._timeout, backend=backend, **options)
        self._made.append(group)
        return group

    @contextmanager
    def installed(self) -> Iterator[None]:
        """During the block `torch.distributed.new_group` is this one."""
        dist.new_group = self.new_group  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.new_group = self._make

    def destroy(self) -> None:
        """Destroy every group that was made, the newest first. All ranks of the world call, at the same place.

        Raises what a barrier raises if another rank is gone; the groups then go with the world.
        """
        current().synchronize()
        dist.barrier()  # nobody still reads from a group, nor from this rank's end of it
        for group in reversed(self._made):
            dist.destroy_process_group(group)  # does nothing for a group of others
        self._made.clear()
        self._shared.clear()
        gc.collect()  # gloo closes its sockets and ends its threads when the last reference goes: models lie in cycles
