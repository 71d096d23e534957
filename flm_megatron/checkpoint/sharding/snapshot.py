"""Copies of what a process stores, in host memory that is reused.

Newly allocated memory comes page by page while training waits, which takes several times as long as the copy itself.
Copies for a save are made beside the next step's passes (`BackgroundCopies`): training waits for them before it changes
what they read, in `optimizer_step`.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.device import current
from flm_megatron.device.base import Copying

ALIGNMENT = 64
Stored = tuple[str, Region, torch.Tensor]
"""Name of a logical tensor, a region of it, and its values, of shape `region.sizes`."""
_free: list[HostBuffer] = []
_preparing: list[threading.Thread] = []


class HostBuffer:
    """Memory that the device copies into at full speed."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.nbytes = len(mapped)
        current().pin(mapped)

    def close(self) -> None:
        """Unregister it from the device; the memory is freed with the last tensor in it."""
        current().unpin(self.mapped)


def take_buffer(nbytes: int) -> HostBuffer:
    """Memory of at least `nbytes`: the buffer given back last if it is large enough, else a new one."""
    while _preparing and threading.current_thread() not in _preparing:
        _preparing.pop().join()
    while _free:
        buffer = _free.pop()
        if buffer.nbytes >= nbytes:
            return buffer
        buffer.close()
    return HostBuffer(mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def prepare_buffer(nbytes: int) -> None:
    """Prepare the next `take_buffer`'s memory in the background: the first snapshot is then as fast as later ones."""

    def prepare() -> None:
        """Touch all pages: torch lets training go on meanwhile."""
        buffer = take_buffer(nbytes)
        torch.frombuffer(buffer.mapped, dtype=torch.uint8).zero_()
        give_back(buffer)

    thread = threading.Thread(target=prepare, name="snapshot memory", daemon=True)
    thread.start()
    _preparing.append(thread)


def give_back(buffer: HostBuffer) -> None:
    """Make a buffer available again, whose values are no longer needed. The largest one is kept, others are closed."""
    _free.append(buffer)
    _free.sort(key=lambda free: free.nbytes)
    while len(_free) > 1:
        _free.pop(0).close()


def placed(regions: Sequence[Stored]) -> tuple[list[int], int]:
    """Where each region begins when they lie in one buffer, and how many bytes they take."""
    positions, end = [], 0
    for _, _, tensor in regions:
        positions.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return positions, end


def snapshot(regions: Sequence[Stored], buffer: HostBuffer) -> list[Stored]:
    """Copy regions into a buffer, at the places that `placed` gives; returns the copies when they are made."""
    copies, copying = _begin(regions, buffer)
    copying.wait()
    return copies


class BackgroundCopies:
    """Copies of `regions` as they are now, in a buffer that `release` gives back.

    Their values are there after `wait`. Until then the regions may change only after the device's `hold_changes`.
    """

    def __init__(self, regions: Sequence[Stored]) -> None:
        self._buffer = take_buffer(placed(regions)[1])
        try:
            self.regions, self._copying = _begin(regions, self._buffer)
        except BaseException:
            give_back(self._buffer)
            raise

    def wait(self) -> None:
        """Return when the copies are made; may be called from any thread."""
        self._copying.wait()

    def release(self) -> None:
        """Let the memory be used again, also after an error."""
        try:
            self.wait()
        finally:
            give_back(self._buffer)


@torch.no_grad()
def _begin(regions: Sequence[Stored], buffer: HostBuffer) -> tuple[list[Stored], Copying]:
    copies, pairs = [], []
    for (name, region, tensor), position in zip(regions, placed(regions)[0], strict=True):
        flat = torch.frombuffer(buffer.mapped, dtype=torch.uint8, offset=position, count=tensor.nbytes)
        copy = flat.view(tensor.dtype).view(tensor.shape)
        pairs.append((copy, tensor.detach()))
        copies.append((name, region, copy))
    return copies, current().copy_aside(pairs)
