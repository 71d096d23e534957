"""How long a rank takes to load its state: from its own host's memory, from a neighbour's, and from the disk.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.loading [--layers 4] [--folder /tmp]

One rank with a real model and optimizer, the neighbour's agent behind a TCP connection of this machine, the disk with
its cache emptied of the checkpoint. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.reliability.stall import GIB, MANIFEST, train_state_of, wait_whole
from benchmarks.reliability.timing import forget, timed
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.memory.blobs import NONE
from flm_megatron.checkpoint.memory.peers import Peers
from flm_megatron.checkpoint.memory.reader import MemoryCheckpoint
from flm_megatron.checkpoint.memory.refresh import Refresher
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_state, save_state, stored_state
from flm_megatron.config.schema import DistributedConfig
from flm_megatron.distributed.world import world

TIMES = 3


class Elsewhere(MemoryCheckpoint):
    """A generation whose blobs are all read over TCP."""

    def __init__(self, near: MemoryCheckpoint) -> None:
        super().__init__(near.generation, near.blobs, near.endpoints, near.local, host=-1)


def measure(layers: int, folder: Path) -> None:
    """Load the same state from everywhere."""
    with train_state_of(layers) as state:
        nbytes = sum(tensor.nbytes for _, _, tensor in stored_state(state.chunks, state.optimizer)[1])
        peers = Peers()
        refresher = Refresher(peers, NONE, None)
        refresher.reserve(state.chunks, state.optimizer, None)
        refresher.refresh(state.chunks, state.optimizer, MANIFEST)
        wait_whole(peers.local)
        search_s = timed(lambda: peers.search(lambda stage, step: True))
        _, near = peers.search(lambda stage, step: True)
        assert near is not None
        save_state(folder / "saved", state.chunks, state.optimizer, MANIFEST).wait()
        print(f"state {nbytes / GIB:.2f} GiB")
        print(f"copies are found and held against their checksums in {search_s:.2f} s")
        print("| from | s | GiB/s |\n|---|---|---|")
        checkpoints: dict[str, LogicalCheckpoint] = {"own host's memory": near, "a neighbour's memory": Elsewhere(near)}
        for name, checkpoint in checkpoints.items():
            load = partial(load_state, checkpoint, state.chunks, state.optimizer)
            report(name, [timed(load) for _ in range(TIMES)], nbytes)
        seconds = []
        for _ in range(TIMES):
            forget(folder)
            load = partial(load_state, open_checkpoint(folder / "saved"), state.chunks, state.optimizer)
            seconds.append(timed(load))
        report("the disk", seconds, nbytes)
        peers.stop()


def report(name: str, seconds: list[float], nbytes: int) -> None:
    """One row."""
    print(f"| {name} | {median(seconds):.2f} | {nbytes / GIB / median(seconds):.2f} |", flush=True)


def main() -> None:
    """Measure in a world of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        world(DistributedConfig(), 0, 1, f"file://{folder}/store"),
    ):
        measure(options.layers, Path(folder))


if __name__ == "__main__":
    main()
