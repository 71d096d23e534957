"""Copies the state into memory: at an interval a new generation, which the agents then copy to their neighbours.

Training waits for one copy into memory and one small message; the agent of the host computes checksums and sends. A
generation counts as complete when every rank's agent has confirmed it, which the ranks tell each other at the next
refresh. Until then the previous one is kept, so there are two at a time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.memory.blobs import NONE, Generation
from flm_megatron.checkpoint.memory.contents import header_of
from flm_megatron.checkpoint.memory.peers import Peers
from flm_megatron.checkpoint.sharding.model_state import stored_state
from flm_megatron.checkpoint.sharding.snapshot import HostBuffer, placed, snapshot
from flm_megatron.device import current
from flm_megatron.distributed.channels import gathered
from flm_megatron.engine.types import ModelChunk, Optimizer
from flm_megatron.errors import FlmError

WHOLE = "whole"


class Refresher:
    """Keeps generations in memory, for one start of the ranks. All ranks call its methods together."""

    def __init__(self, peers: Peers, newest: Generation, kept: Generation | None) -> None:
        """`newest` is the last generation that any agent knows; `kept` the one that training continues from."""
        self.peers = peers
        self.kept = kept or NONE
        """The newest generation that is whole on all ranks."""
        self.begun = Generation(newest.start + 1, 0)
        self.step = 0
        """The step of the newest generation that was begun."""
        self._failure: str | None = None
        self._buffers: dict[int, HostBuffer] = {}

    def reserve(self, chunks: Sequence[ModelChunk], optimizer: Optimizer | None, budget_gib: float | None) -> None:
        """Allocate the memory for copies of a stage's state; raises as `Peers.reserve`."""
        nbytes = placed(stored_state(chunks, optimizer)[1])[1]
        self.peers.reserve(nbytes, budget_gib)
        with suppress(FlmError, OSError):  # `refresh` will say what is wrong
            for _ in range(2):  # both are mapped now, not while training waits for the first copies
                self._buffer(nbytes)

    def refresh(self, chunks: Sequence[ModelChunk], optimizer: Optimizer | None, manifest: Manifest) -> str | None:
        """Copy the state that `manifest` describes; returns a line if this or the last copy has a problem.

        Never waits for another host's agent.
        """
        last, step = self._last(), manifest.position.step
        assert step is not None, "what is trained stands at a step"
        if last == "busy":
            return (
                f"no copy of step {step} in memory: the one of step {self.step} is still on its way to the neighbours"
            )
        if last == WHOLE:
            self.kept = self.begun if self.step else self.kept
        line = None if last == WHOLE else f"the copy of step {self.step} in memory is not whole: {last}"
        self.begun = Generation(self.begun.start, self.begun.number + 1)
        self.step = step
        self._failure = None
        try:
            self._copy(chunks, optimizer, manifest)
        except (FlmError, OSError) as error:
            self._failure = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        return line

    def _last(self) -> str:
        """The state of the last generation on all ranks: complete, in progress on any, or why it failed on one."""
        own = self._own() if self.step else WHOLE
        flags = torch.tensor([own == "", own not in ("", WHOLE)], dtype=torch.int32, device=current().torch_device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        busy, failed = flags.tolist()
        if busy:
            return "busy"
        if not failed:
            return WHOLE
        rank, reason = next((rank, reason) for rank, reason in enumerate(gathered(own)) if reason != WHOLE)
        return f"rank {rank}: {reason}"

    def _own(self) -> str:
        """The state of this rank's last copy."""
        if self._failure is not None:
            return self._failure
        try:
            return self.peers.local.copy_state(self.peers.rank)
        except (FlmError, OSError) as error:
            return f"this host's agent does not answer: {error}"

    def _copy(self, chunks: Sequence[ModelChunk], optimizer: Optimizer | None, manifest: Manifest) -> None:
        peers = self.peers
        tensors, parts = stored_state(chunks, optimizer)
        buffer = self._buffer(placed(parts)[1])
        snapshot(parts, buffer)
        at = manifest.position
        described = manifest if peers.rank == 0 else Manifest(position=StagePosition(at.step, stage=at.stage))
        peers.local.commit(header_of(tensors, parts, peers.size, described), peers.neighbour)

    def _buffer(self, nbytes: int) -> HostBuffer:
        """The agent's memory for the generation that was begun, mapped here once."""
        local = self.peers.local
        number, live, descriptor = local.begin(self.begun, self.kept, self.peers.rank, nbytes)
        try:
            for gone in set(self._buffers) - set(live):
                self._buffers.pop(gone).close()
            if number not in self._buffers:
                size = os.fstat(descriptor).st_size
                mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
                self._buffers[number] = HostBuffer(mapped)
        finally:
            os.close(descriptor)
        return self._buffers[number]
