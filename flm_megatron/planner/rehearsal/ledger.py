"""What memory is held while a rank is rehearsed: every storage by what it is for, and the moment when most is held."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch

Use = Literal["weights", "gradients", "optimizer", "activations", "logits", "temporaries"]
USES: tuple[Use, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries")
ROUNDED = 512
"""Bytes that CUDA's caching allocator rounds every allocation up to."""


@dataclass
class Held:
    """One storage: its bytes as the allocator would count them, and what it is for."""

    nbytes: int
    use: Use


@dataclass(frozen=True)
class Peak:
    """The most that was held at a time, in bytes, what for, and what was going on then."""

    nbytes: int = 0
    by_use: dict[str, int] = field(default_factory=dict)
    moment: str = ""


class Ledger:
    """Counts storages from their first tensor to their last reference."""

    def __init__(self) -> None:
        self.use: Use = "weights"
        self.moment = ""
        self.peak = Peak()
        self._held: dict[int, Held] = {}
        self._by_use: Counter[str] = Counter()
        self._live = 0
        self._in_pass: set[int] | None = None

    @property
    def live(self) -> int:
        """Bytes that are held now."""
        return self._live

    def by_use(self) -> dict[str, int]:
        """Bytes that are held now, by what they are for."""
        return {use: self._by_use[use] for use in USES}

    def begin_peak(self) -> Peak:
        """The peak so far; from now on it is that of what follows."""
        before, self.peak = self.peak, Peak(self._live, self.by_use(), self.moment)
        return before

    def enter(self, tensor: torch.Tensor, what: str) -> None:
        """Count the storage of a tensor that the operation `what` gave, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = Held(0, self.use)
        if self._in_pass is not None:
            self._in_pass.add(key)
        weakref.finalize(storage, self._leave, key)
        self.resize(storage, what)

    def resize(self, storage: torch.UntypedStorage, what: str) -> None:
        """Count a storage at the size that it has now: recomputation gives the memory of an output back, and takes it
        again."""
        held = self._held.get(storage._cdata)
        if held is None:
            return
        nbytes = -(-storage.nbytes() // ROUNDED) * ROUNDED
        self._by_use[held.use] += nbytes - held.nbytes
        self._live += nbytes - held.nbytes
        held.nbytes = nbytes
        if self._live > self.peak.nbytes:
            self.peak = Peak(self._live, self.by_use(), f"{self.moment}: {what}")

    def classify(self, tensor: torch.Tensor, use: Use) -> None:
        """Say what a tensor that is held is for."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        if held is not None:
            self._by_use[held.use] -= held.nbytes
            self._by_use[use] += held.nbytes
            held.use = use

    def begin_forward(self) -> None:
        """A forward pass begins: what it allocates is temporary until it has ended."""
        self._in_pass = set()

    def end_forward(self) -> None:
        """What the pass has left is kept for the backward pass."""
        for key in self._in_pass or ():
            held = self._held.get(key)
            if held is not None and held.use == "temporaries":
                self._by_use["temporaries"] -= held.nbytes
                self._by_use["activations"] += held.nbytes
                held.use = "activations"
        self._in_pass = None

    def _leave(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._by_use[held.use] -= held.nbytes
            self._live -= held.nbytes
