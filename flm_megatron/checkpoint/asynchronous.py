"""A save under way: at once, or in a thread of its own over processes' own group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from flm_megatron.checkpoint.logical import TensorInfo
from flm_megatron.checkpoint.shard_file import Rectangle
from flm_megatron.checkpoint.writer import write_checkpoint

SLOWEST_WRITE = timedelta(hours=6)
_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class SaveHandle:
    """A checkpoint being written by all processes. With `written` it is written in the background, so the rectangles
    must own their memory, and `written()` is called when that is no longer needed."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        shards: Mapping[str, list[Rectangle]],
        manifest: dict[str, Any],
        group: dist.ProcessGroup | None,
        written: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._manifest: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

        arguments = (path, tensors, shards, manifest, group)
        if written is not None:
            self._thread = threading.Thread(target=self._write, args=(written, *arguments), name=f"save {path.name}")
            self._thread.start()
        else:
            self._manifest = write_checkpoint(*arguments)

    @property
    def done(self) -> bool:
        """Whether writing is over, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> dict[str, Any]:
        """Wait until the checkpoint is whole on all ranks; returns its manifest.

        Raises what `write_checkpoint` raises, on every rank, if the save failed on any.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._manifest is not None, "a save that did not fail has a manifest"
        return self._manifest

    def _write(self, written: Callable[[], None], *arguments: Any) -> None:
        try:
            self._manifest = write_checkpoint(*arguments)
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            written()


def writing_group() -> dist.ProcessGroup | None:
    """A gloo group of all processes for saving alone, made once; none without torch.distributed.

    Saving in the background must not share a group with training: their messages would cross. All ranks must call.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=SLOWEST_WRITE)
    return _groups[world]
