"""Copies for saves: when they are made, whose memory they take, and that it is given back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.sharding import snapshot as module
from flm_megatron.checkpoint.sharding.snapshot import BackgroundCopies, Stored, give_back, take_buffer
from flm_megatron.device import current, use
from flm_megatron.device.base import Copying
from flm_megatron.device.cpu import CpuDevice
from tests.support.late_device import LateDevice


class Full(CpuDevice):
    """Fails at once, or while copies are under way."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def copy_aside(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Copying:
        """As a GPU whose copy engine reports an error."""
        if self.at_once:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self

    def wait(self) -> None:
        """The error comes later."""
        raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No memory of other tests; the device of before afterwards."""
    monkeypatch.setattr(module, "_free", [])
    before = current()
    yield
    use(before)


def stored(values: Tensor) -> list[Stored]:
    """A tensor, whole, and a part of it that does not lie in one piece."""
    return [("a", Region.whole(tuple(values.shape)), values), ("b", Region((0, 1), (4, 2)), values[:, 1:3])]


def test_what_is_copied_may_change_once_changes_were_held_back() -> None:
    device = LateDevice()
    use(device)
    values = torch.arange(20.0).view(4, 5)
    expected = values.clone()
    copies = BackgroundCopies(stored(values))
    device.hold_changes()
    values.zero_()
    copies.wait()
    (_, _, whole), (name, region, part) = copies.regions
    assert torch.equal(whole, expected) and torch.equal(part, expected[:, 1:3])
    assert (name, region) == ("b", Region((0, 1), (4, 2)))
    copies.release()


def test_saves_use_the_same_memory() -> None:
    values = torch.zeros(4, 5)
    addresses = set()
    for _ in range(3):
        copies = BackgroundCopies(stored(values))
        addresses.add(copies.regions[0][2].data_ptr())
        copies.release()
    assert len(addresses) == len(module._free) == 1


def test_no_more_than_one_buffer_is_kept() -> None:
    buffers = [take_buffer(size) for size in (1000, 3000, 2000)]
    for buffer in buffers:
        give_back(buffer)
    assert [buffer.nbytes for buffer in module._free] == [3000]


def test_memory_comes_back_where_copying_fails() -> None:
    use(Full(at_once=True))
    with pytest.raises(RuntimeError, match="unspecified"):
        BackgroundCopies(stored(torch.zeros(4, 5)))
    assert len(module._free) == 1
    use(Full(at_once=False))
    copies = BackgroundCopies(stored(torch.zeros(4, 5)))
    assert not module._free
    with pytest.raises(RuntimeError, match="unspecified"):
        copies.release()
    assert len(module._free) == 1
