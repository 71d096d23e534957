"""Offline growth of a checkpoint with optimizer state, beside `cp` of the bytes it writes.

    python benchmarks/growth/offline.py FOLDER [--hidden 1024] [--layers 8] [--operators zero mask] [--repeats 5]
    torchrun --standalone --nproc-per-node 2 benchmarks/growth/offline.py FOLDER

Writes a source checkpoint into FOLDER (bf16 weights, fp32 masters and moments), grows every dimension by a quarter, and
copies the result with cp; both include bringing the files to the disk, and start from an empty page cache (needs root).
Growth and copy take turns; the first turn warms up and is not counted. Prints one Markdown table row for each operator,
with medians; files are removed again.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.tools.reshard import stored_bytes
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import GrowthConfig, ModelConfig
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.distributed.processes import Processes
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.offline import write_changed
from flm_megatron.growth.plan import make_plan
from flm_megatron.model.parameters import parameter_count


def shape(hidden: int, layers: int) -> ModelConfig:
    """A model with head dim 64."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 8 // 3,
        num_attention_heads=hidden // 64,
        vocab_size=32000,
    )


def rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget() -> None:
    """Write everything out and empty the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def copy(source: Path, target: Path) -> float:
    """Seconds of cp and fsync."""
    forget()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return time.perf_counter() - began


def turn(checkpoint: GrownCheckpoint, folder: Path, processes: Processes) -> tuple[float, float, float]:
    """Grow, then copy: seconds of growth, CPU seconds of this process, seconds of the copy."""
    grown = folder / "grown"
    processes.on_first(forget)
    began, cpu = time.perf_counter(), time.process_time()
    write_changed(checkpoint, grown, processes)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu

    def compare() -> float:
        """Copy on one process while the others wait; remove both."""
        copied = copy(grown, folder / "copy")
        for path in (grown, folder / "copy"):
            shutil.rmtree(path)
        return copied

    return seconds, cpu, processes.on_first(compare)


def main() -> None:
    """Write the source, take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=8, help="a multiple of 4")
    parser.add_argument("--operators", choices=["zero", "mask"], nargs="+", default=["zero", "mask"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    old, new = shape(args.hidden, args.layers), shape(args.hidden * 5 // 4, args.layers * 5 // 4)
    source = args.folder / "source"
    before = rss_gib()
    with launched_processes() as processes:
        copy_checkpoint(
            InitialCheckpoint(old, 1, optimizer=True, dtype=torch.bfloat16),
            source,
            Manifest.from_json({"optimizer_step": 1}),
        )
        for operator in args.operators:
            operators = dict.fromkeys(("hidden", "ffn", "heads", "layers"), operator)
            plan = make_plan(old, new, GrowthConfig(**operators, layer_selection="interleave", mask_steps=1000), seed=1)
            checkpoint = GrownCheckpoint(open_checkpoint(source), plan)
            turns = [turn(checkpoint, args.folder, processes) for _ in range(args.repeats + 1)][1:]
            seconds, cpu, copied = (statistics.median(column) for column in zip(*turns, strict=True))
            if processes.rank == 0:
                print(
                    f"| {parameter_count(old) / 1e6:.0f} M -> {parameter_count(new) / 1e6:.0f} M | {operator} | "
                    f"{processes.size} | {stored_bytes(checkpoint.tensors) / 2**30:.2f} | {seconds:.1f} | {cpu:.1f} | "
                    f"{copied:.1f} | {copied / seconds:.0%} | {rss_gib() - before:.2f} |",
                    flush=True,
                )
        processes.on_first(lambda: shutil.rmtree(source))


if __name__ == "__main__":
    main()
