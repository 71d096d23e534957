"""Counts the bytes of all tensors that are alive, at their peak, on any device."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import Self


class LiveBytes(TorchDispatchMode):
    """While it is entered, every storage that an operation returns is counted until it is freed.

    A storage counts once however many tensors view it. Storages made before must be shown to `count`. What kernels
    allocate inside themselves and free again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> Self:
        """Start to watch; storages that are emptied or filled in place are noticed too."""
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._count(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop to watch."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage from now until it is freed, unless it is counted already."""
        self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the storage object lives as long as the storage itself
        if key not in self._sizes:
            weakref.finalize(storage, self._free, key)
        self.now += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def count_existing(self) -> None:
        """Count every tensor that Python knows of."""
        gc.collect()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self.count(thing)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
