"""How long training waits for an asynchronous save, and for a copy into memory, beside a plain copy of the same bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.stall [--layers 6] [--only save|memory] [--folder /tmp]

One rank with a real model and optimizer (bf16 weights, fp32 masters and moments). Prints one line per measure.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.reliability.timing import timed
from flm_megatron import kernels
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.memory.blobs import NONE
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent
from flm_megatron.checkpoint.memory.peers import Peers
from flm_megatron.checkpoint.memory.refresh import Refresher
from flm_megatron.checkpoint.memory.starting import agent_name, start_agent
from flm_megatron.checkpoint.sharding.model_state import prepare_asynchronous_save, save_state, stored_state
from flm_megatron.checkpoint.sharding.snapshot import Stored
from flm_megatron.config.schema import DistributedConfig, KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.distributed.world import layout, world

if TYPE_CHECKING:
    from flm_megatron.training.step import TrainState

GIB = 2**30
COPIED = 2**29
TIMES = 5
STEPS_S = 10.0
"""Before the first save of a run there are steps."""
MANIFEST = Manifest(position=StagePosition(1, optimizer_step=1, stage="small"))


def model(layers: int) -> ModelConfig:
    """About 0.67 GiB of state a layer, 0.44 GiB for the rest."""
    return ModelConfig(
        num_layers=layers, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, vocab_size=8192
    )


class Plain:
    """Plain copies of so many bytes into memory that was written before, of COPIED bytes at a time."""

    def __init__(self, nbytes: int) -> None:
        self.source, self.target = (torch.ones(COPIED, dtype=torch.uint8) for _ in range(2))
        self.times = nbytes / COPIED
        self.seconds: list[float] = []

    def again(self) -> None:
        """Take the time once more."""
        self.seconds.append(self.times * median(timed(lambda: self.target.copy_(self.source)) for _ in range(3)))

    @property
    def median_s(self) -> float:
        """Seconds for all bytes."""
        return median(self.seconds)


def report(name: str, seconds: list[float], plain: Plain) -> None:
    """The first time, and the median of the later ones."""
    later, plain_s = median(seconds[1:]), plain.median_s
    times = f"{seconds[0]:.2f} | {later:.2f} | {plain_s:.2f} | {seconds[0] / plain_s:.2f} | {later / plain_s:.2f}"
    print(f"| {name} | {times} |", flush=True)


class WithNeighbour(Peers):
    """A world of one host whose copies go to a second agent on this machine."""

    target: Endpoint | None = None

    @property
    def neighbour(self) -> Endpoint | None:
        """The second agent."""
        return self.target


@contextmanager
def train_state_of(layers: int) -> Iterator[TrainState]:
    """A real model and optimizer on one rank."""
    from flm_megatron.training.step import TrainState

    kernels.use(kernels.choose(KernelsConfig()))
    stage = StageConfig(name="small", model=model(layers), precision="bf16", parallel=ParallelConfig())
    with layout(stage.parallel, 600):
        yield TrainState(stage, 64)


def measure(layers: int, only: str | None, folder: Path) -> None:
    """All measures, or those of one kind, one after the other."""
    with train_state_of(layers) as state:
        parts = stored_state(state.chunks, state.optimizer)[1]
        nbytes = sum(tensor.nbytes for _, _, tensor in parts)
        print(f"state {nbytes / GIB:.2f} GiB in {len(parts)} regions")
        print("| | first, s | later, s | plain copy, s | first / plain | later / plain |\n|---|---|---|---|---|---|")
        new_memory(parts, Plain(nbytes))
        if only != "save":
            memory_stall(state, Plain(nbytes), nbytes)
        if only != "memory":
            save_stall(state, Plain(nbytes), folder)


def new_memory(parts: list[Stored], plain: Plain) -> None:
    """What a copy takes into memory that is asked for anew each time."""
    seconds = []
    for _ in range(TIMES):
        plain.again()
        seconds.append(timed(lambda: [tensor.detach().to("cpu", copy=True) for _, _, tensor in parts]))
    report("copy into new memory each time", seconds, plain)


def save_stall(state: TrainState, plain: Plain, folder: Path) -> None:
    """Saves to disk in the background, each waited for before the next."""
    prepare_asynchronous_save(state.chunks, state.optimizer)  # as at the start of a stage
    time.sleep(STEPS_S)
    seconds = []
    for number in range(TIMES):
        plain.again()
        began = time.perf_counter()
        handle = save_state(folder / str(number), state.chunks, state.optimizer, MANIFEST, asynchronous=True)
        seconds.append(time.perf_counter() - began)
        handle.wait()
        shutil.rmtree(folder / str(number))
    report("asynchronous save", seconds, plain)


def memory_stall(state: TrainState, plain: Plain, nbytes: int) -> None:
    """Copies into the host agent's memory, passed on to a neighbour's; each is waited for before the next."""
    with ExitStack() as stack:
        other = stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        stack.callback(other.kill)
        start_agent(other.pid, "127.0.0.1")
        neighbour = stack.enter_context(LocalAgent(agent_name(other.pid)))
        neighbour.reserve([nbytes] * 2, 3 * nbytes)
        peers = WithNeighbour()
        peers.target = neighbour.endpoint()
        refresher = Refresher(peers, NONE, None)
        reserved_s = timed(lambda: refresher.reserve(state.chunks, state.optimizer, None))
        seconds, passing = [], []
        for step in range(1, TIMES + 1):
            plain.again()
            manifest = Manifest(position=replace(MANIFEST.position, step=step))
            refresh = partial(refresher.refresh, state.chunks, state.optimizer, manifest)
            seconds.append(timed(refresh))
            passing.append(timed(lambda: wait_whole(peers.local)))
        peers.stop()
        neighbour.stop()
    report("copy into the agent's memory", seconds, plain)
    print(
        f"memory set aside in {reserved_s:.1f} s; checked and passed on in {median(passing):.1f} s a copy", flush=True
    )


def wait_whole(agent: LocalAgent) -> None:
    """Until the newest copy is whole at the neighbour."""
    while (state := agent.copy_state(0)) != "whole":
        assert not state, state
        time.sleep(0.005)


def main() -> None:
    """Measure in a world of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", choices=("save", "memory"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        world(DistributedConfig(), 0, 1, f"file://{folder}/store"),
    ):
        measure(options.layers, options.only, Path(folder))


if __name__ == "__main__":
    main()
