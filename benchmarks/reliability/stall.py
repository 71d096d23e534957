"""How long training waits for an asynchronous save, and for a copy into memory, beside a plain copy of the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/reliability/stall.py [--layers 6] [--only save|memory] [--folder /tmp]

One rank with a real engine and optimizer (bf16 weights, fp32 masters and moments). Prints one line per measure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from flm_megatron import kernels
from flm_megatron.checkpoint.engine import prepare_asynchronous_save, save_state, stored_state
from flm_megatron.checkpoint.memory.blobs import NONE
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent
from flm_megatron.checkpoint.memory.peers import Peers
from flm_megatron.checkpoint.memory.refresh import Refresher
from flm_megatron.checkpoint.memory.starting import agent_name, start_agent
from flm_megatron.config.schema import DistributedConfig, KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.training.parallel import layout, world

if TYPE_CHECKING:
    from flm_megatron.training.step import Engine

GIB = 2**30
TIMES = 5
MANIFEST = {"stage": "small", "step": 1, "optimizer_step": 1}


def model(layers: int) -> ModelConfig:
    """About 0.67 GiB of state a layer, 0.44 GiB for the rest."""
    return ModelConfig(
        num_layers=layers, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, vocab_size=8192
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_copy_s(nbytes: int) -> float:
    """Seconds for a copy of so many bytes into memory that was written before: 1 GiB again and again."""
    source, target = (torch.ones(GIB, dtype=torch.uint8) for _ in range(2))
    return median(timed(lambda: target.copy_(source)) for _ in range(TIMES)) * nbytes / GIB


def report(name: str, seconds: list[float], plain_s: float) -> None:
    """The first time, and the median of the later ones."""
    later = median(seconds[1:])
    print(
        f"| {name} | {seconds[0]:.2f} | {later:.2f} | {seconds[0] / plain_s:.2f} | {later / plain_s:.2f} |", flush=True
    )


class WithNeighbour(Peers):
    """A world of one host whose copies go to a second agent on this machine."""

    target: Endpoint | None = None

    @property
    def neighbour(self) -> Endpoint | None:
        """The second agent."""
        return self.target


@contextmanager
def engine_of(layers: int) -> Iterator[Engine]:
    """A real engine on one rank."""
    from flm_megatron.training.step import Engine

    kernels.use(kernels.choose(KernelsConfig()))
    stage = StageConfig(name="small", model=model(layers), precision="bf16", parallel=ParallelConfig())
    with layout(stage.parallel, 600):
        yield Engine(stage, 64)


def measure(layers: int, only: str | None, folder: Path) -> None:
    """All measures, or those of one kind, one after the other."""
    with engine_of(layers) as engine:
        parts = stored_state(engine.chunks, engine.optimizer)[1]
        nbytes = sum(tensor.nbytes for _, _, tensor in parts)
        plain_s = plain_copy_s(nbytes)
        print(f"state {nbytes / GIB:.2f} GiB in {len(parts)} regions; a plain copy of it takes {plain_s:.2f} s")
        print("| | first, s | later, s | first / plain | later / plain |\n|---|---|---|---|---|")
        fresh = [timed(lambda: [t.detach().to("cpu", copy=True) for _, _, t in parts]) for _ in range(TIMES)]
        report("copy into new memory each time", fresh, plain_s)
        if only != "save":
            memory_stall(engine, plain_s, nbytes)
        if only != "memory":
            save_stall(engine, plain_s, folder)


def save_stall(engine: Engine, plain_s: float, folder: Path) -> None:
    """Saves to disk in the background, each waited for before the next."""
    prepare_asynchronous_save(engine.chunks, engine.optimizer)  # as at the start of a stage
    seconds = []
    for number in range(TIMES):
        began = time.perf_counter()
        handle = save_state(folder / str(number), engine.chunks, engine.optimizer, MANIFEST, asynchronous=True)
        seconds.append(time.perf_counter() - began)
        handle.wait()
    report("asynchronous save", seconds, plain_s)


def memory_stall(engine: Engine, plain_s: float, nbytes: int) -> None:
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
        reserved_s = timed(lambda: refresher.reserve(engine.chunks, engine.optimizer, None))
        seconds, passing = [], []
        for step in range(1, TIMES + 1):
            manifest = MANIFEST | {"step": step}
            seconds.append(timed(lambda: refresher.refresh(engine.chunks, engine.optimizer, manifest)))  # noqa: B023
            passing.append(timed(lambda: wait_whole(peers.local)))
        peers.stop()
        neighbour.stop()
    report("copy into the agent's memory", seconds, plain_s)
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
