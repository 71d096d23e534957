"""A save in progress: in this thread or in one of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist

from flm_megatron.checkpoint.logical import TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.torch_dist.shard_file import SourceRegion
from flm_megatron.checkpoint.torch_dist.writer import write_checkpoint
from flm_megatron.distributed.channels import world_channel
from flm_megatron.distributed.processes import Processes


class SaveHandle:
    """A checkpoint being written by all processes. With `written` it is written in the background, so the regions
    must own their memory, and `written()` is called when that is no longer needed."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        shards: Mapping[str, list[SourceRegion]],
        manifest: Manifest,
        processes: Processes,
        written: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._manifest: Manifest | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

        write = partial(write_checkpoint, path, tensors, shards, manifest, processes)
        if written is not None:
            # A daemon: one that waits for ranks that are gone must not keep the process.
            self._thread = threading.Thread(
                target=self._write, args=(write, written), name=f"save {path.name}", daemon=True
            )
            self._thread.start()
        else:
            self._manifest = write()

    @property
    def done(self) -> bool:
        """Whether writing has ended, successfully or not."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this process knows that the save has failed; the others will know too."""
        return self._error is not None

    def wait(self, timeout_s: float | None = None) -> Manifest:
        """Wait until the checkpoint is whole on all ranks; returns its manifest, as `write_checkpoint` does.

        Raises what `write_checkpoint` raises, on every rank, if the save failed on any, and TimeoutError after
        `timeout_s` seconds.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.path} is not whole after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        assert self._manifest is not None, "a save that did not fail has a manifest"
        return self._manifest

    def _write(self, write: Callable[[], Manifest], written: Callable[[], None]) -> None:
        try:
            self._manifest = write()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            written()


def writing_processes() -> Processes:
    """All processes, for saving alone; this one without torch.distributed. All ranks must call, in the main thread.

    Saving in the background must not share a communicator with training: their messages would cross.
    """
    return Processes(world_channel("saving") if dist.is_initialized() else None)
