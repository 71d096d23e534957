"""What checking every byte costs when a run resumes: `load_state` with block checksums and without any.

    python -m benchmarks.reliability.load_checks --folder /tmp/load --millions 300 --repeats 7

Prints Markdown. A model with its optimizer on one process is loaded again and again, in turn with and without checks,
from the disk (the checkpoint's pages are dropped before) and from the page cache. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.measure import make
from benchmarks.reliability.timing import forget, timed


def loaders(checkpoint: Path, trainer: Any) -> dict[bool, Any]:
    """Functions that load the checkpoint, with checks (True) and without."""
    from flm_megatron.checkpoint.files.block_checksums import CheckedRun
    from flm_megatron.checkpoint.sharding.model_state import load_state
    from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint

    check = CheckedRun.check

    def load(checked: bool) -> None:
        """Open the checkpoint and fill the model and its optimizer."""
        CheckedRun.check = check if checked else lambda *_: None  # type: ignore[method-assign]
        load_state(TorchDistCheckpoint(checkpoint, blocks=checked), trainer.chunks, trainer.optimizer)

    return {checked: (lambda checked=checked: load(checked)) for checked in (True, False)}


def measure(checkpoint: Path, repeats: int) -> None:
    """Load under a world of this process, and print a row for each state of the page cache."""
    from flm_megatron.checkpoint.described import required_model
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.config.schema import DistributedConfig, ParallelConfig, StageConfig
    from flm_megatron.distributed.world import layout, world
    from flm_megatron.training.step import TrainState

    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    with (
        tempfile.TemporaryDirectory() as folder,
        world(DistributedConfig(), 0, 1, f"file://{folder}/store"),
        layout(ParallelConfig(), 600),
    ):
        model = required_model(open_checkpoint(checkpoint), str(checkpoint))
        load = loaders(checkpoint, TrainState(StageConfig(model=model, precision="bf16"), 128))
        for name, prepare in (("disk", lambda: forget(checkpoint)), ("page cache", lambda: None)):
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(repeats):
                for checked, seconds in times.items():
                    prepare()
                    seconds.append(timed(load[checked]))
            ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
            with_checks, without = (statistics.median(times[checked]) for checked in (True, False))
            print(f"| {name} | {size / 1e9:.2f} | {with_checks:.2f} | {without:.2f} | {ratio:.3f} |", flush=True)


def main() -> None:
    """Make the checkpoint, measure, and clear up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder with room")
    parser.add_argument("--millions", type=int, default=300, choices=[10, 100, 300, 1000], help="parameters")
    parser.add_argument("--repeats", type=int, default=7, help="loads of each kind")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        checkpoint = make(options.folder, options.millions)
        print("| from | GB | s with checks | s without | ratio, median of pairs |\n|---|---|---|---|---|")
        measure(checkpoint, options.repeats)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
