"""Copies of the state in the hosts' memory: making them while a launched run trains, finding them when it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.schema import MemoryConfig, RunConfig
from flm_megatron.distributed.world import is_main_rank
from flm_megatron.errors import DamagedError, FlmError, RequestError

if TYPE_CHECKING:
    from flm_megatron.checkpoint.memory.reader import MemoryCheckpoint
    from flm_megatron.engine.types import Optimizer, ReplicatedChunk
    from flm_megatron.training.resume.start import Start

NOT_USED = "checkpoint.memory is not used: it is for runs under torchrun, which starts ranks again that were lost"
ELASTIC = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun sets for its ranks."""


@contextmanager
def memory_copies(run: RunConfig) -> Iterator[MemoryCopies | None]:
    """During the block the hosts of the world keep copies; they are released when it ends without an error.

    None where the run file does not ask for it, or the launcher does not restart ranks. All ranks of a world must call.

    Raises:
        RequestError: the system cannot.
        FlmError: the agent of a host cannot be started.
    """
    if run.checkpoint.memory is None:
        yield None
        return
    if ELASTIC not in os.environ:
        if is_main_rank():
            print(NOT_USED, flush=True)
        yield None
        return
    from flm_megatron.checkpoint.memory.starting import obstacle

    reason = obstacle()
    if reason:
        raise RequestError(f"checkpoint.memory cannot be used here: {reason}")
    copies = MemoryCopies(run, run.checkpoint.memory)
    yield copies
    copies.peers.stop()


@contextmanager
def forgotten_on_error(copies: MemoryCopies | None) -> Iterator[None]:
    """Discard the copies if the block raises an FlmError, which all ranks raise together.

    Such an error says that the state may be wrong, so the next start must not continue from a copy of it.
    """
    try:
        yield
    except FlmError:
        if copies is not None:
            copies.peers.stop()
        raise


def first_start(run: RunConfig, only: str | None, copies: MemoryCopies | None) -> Start | None:
    """What the ranks of a world start from: the run's newest whole checkpoint, or newer copies in memory.

    None if all is trained. All ranks call.

    Raises:
        RequestError: as `checked_start`.
        DamagedError: there are checkpoints, all of them are damaged, and memory has no copies.
    """
    from flm_megatron.distributed.processes import Processes
    from flm_megatron.training.resume.start import Start, checked_start

    try:
        start = Processes().on_first(partial(checked_start, run, only))
    except DamagedError:
        if copies is None:
            raise
        found = copies.newer(Start(-1, 0, None, resumes=False), only)  # whatever memory has is newer than nothing
        if not found.resumes:
            raise
        copies.line += "; every checkpoint on the disk is damaged"
        return found
    return start if start is None or copies is None else copies.newer(start, only)


class MemoryCopies:
    """The copies seen by one start of the ranks. All ranks call its methods together."""

    def __init__(self, run: RunConfig, config: MemoryConfig) -> None:
        from flm_megatron.checkpoint.memory.peers import Peers
        from flm_megatron.checkpoint.memory.refresh import Refresher

        self.run, self.config = run, config
        self.peers = Peers()
        self.refresher: Refresher | None = None
        self.checkpoint: MemoryCheckpoint | None = None
        """The copies that this start continued from, until newer ones replace them."""
        self.line = ""
        """What was found in memory, as text; empty if nothing was newer than the disk."""

    @property
    def interval_steps(self) -> int:
        """Steps between copies."""
        return self.config.interval_steps

    def newer(self, start: Start, only: str | None) -> Start:
        """`start`, or a later step of the run (of its stage `only`, if given) that is whole in memory.

        Only the first call looks: each stage ends with a checkpoint on disk.
        """
        from flm_megatron.checkpoint.memory.refresh import Refresher
        from flm_megatron.training.resume.continuation import continued, past_history, stage_and_step

        if self.refresher is not None:
            self._let_go()
            self.line = ""
            return start
        names = [stage.name for stage in self.run.stages]

        def wanted(stage: str, step: int) -> bool:
            """Whether the copy is of this run and newer than the checkpoint on disk."""
            return stage in names and only in (None, stage) and (names.index(stage), step) > (start.stage, start.step)

        search, self.checkpoint = self.peers.search(wanted)
        self.refresher = Refresher(self.peers, search.newest, search.generation)
        self.line = search.line
        if self.checkpoint is None:
            self.line += ": going on from the disk" if search.line else ""
            return start
        manifest, where = self.checkpoint.manifest, "the copies in memory"
        past = past_history(self.run, manifest, where)
        name, step = stage_and_step(manifest)
        stage = names.index(name)
        history = continued(self.run, stage, manifest, past, where)
        taken = start.taken if stage == start.stage else self._taken(name)
        found = replace(start, stage=stage, step=step, history=history, taken=taken)
        return replace(found, source=None, resumes=True, passed_over=())

    def _taken(self, stage: str) -> tuple[str, ...]:
        """Names of a stage's checkpoints on disk, for a stage other than the one that the disk continues with."""
        from flm_megatron.distributed.processes import Processes
        from flm_megatron.training.resume.start import checkpoint_store

        return Processes().on_first(lambda: checkpoint_store(self.run).taken(stage))

    def reserve(self, chunks: list[ReplicatedChunk], optimizer: Optimizer) -> None:
        """Reserve memory on the hosts for a stage. Raises RequestError where the budget or a host is too small."""
        assert self.refresher is not None, "`newer` comes first"
        self.refresher.reserve(chunks, optimizer, self.config.budget_gib)

    def refresh(self, chunks: list[ReplicatedChunk], optimizer: Optimizer, manifest: Manifest) -> str | None:
        """Copy the state that `manifest` describes; returns a line for the log if something is wrong."""
        assert self.refresher is not None, "`newer` comes first"
        line = self.refresher.refresh(chunks, optimizer, manifest)
        if self.checkpoint is not None and self.refresher.kept != self.checkpoint.generation:
            self._let_go()
        return line

    def _let_go(self) -> None:
        """Release the memory and connections of the copies that this start continued from."""
        if self.checkpoint is not None:
            self.checkpoint.close()
            self.checkpoint = None
