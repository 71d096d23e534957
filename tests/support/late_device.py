"""A CPU that makes copies for saves as late as it may, as a GPU does that is busy with something else."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor

from flm_megatron.device.base import Copying
from flm_megatron.device.cpu import CpuDevice

PATIENCE_S = 20.0


class Late:
    """Copies that wait to be made."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.pairs = list(pairs)
        self.made = threading.Event()

    def make(self) -> None:
        """Copy what is there by now."""
        for host, tensor in self.pairs:
            host.copy_(tensor)
        self.pairs.clear()
        self.made.set()

    def wait(self) -> None:
        """Wait for them; where nobody holds changes back for so long, they are made then."""
        if not self.made.wait(PATIENCE_S):
            self.make()


class LateDevice(CpuDevice):
    """Copies are made when changes are held back."""

    def __init__(self) -> None:
        self.under_way: list[Late] = []

    def copy_aside(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Copying:
        """Nothing is copied yet."""
        self.under_way.append(Late(pairs))
        return self.under_way[-1]

    def hold_changes(self) -> None:
        """They are copied now."""
        while self.under_way:
            self.under_way.pop().make()
