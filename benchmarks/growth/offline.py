"""Offline growth of a checkpoint with optimizer state, beside `cp` of the bytes it writes.

    python benchmarks/growth/offline.py FOLDER [--hidden 1024] [--layers 12] [--operator zero|mask]

Writes a source checkpoint into FOLDER (fp32 masters and moments, bf16 weights), grows every dimension by a quarter, and
copies the result with cp and fsync. Prints one Markdown table row; files are removed again.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from flm_megatron.checkpoint.initial import InitialCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.processes import Processes
from flm_megatron.checkpoint.reshard import stored_bytes
from flm_megatron.checkpoint.writer import write_view
from flm_megatron.config.schema import GrowthConfig, ModelConfig
from flm_megatron.growth.offline import write_grown
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.view import GrownCheckpoint
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


def main() -> None:
    """Write, grow, copy, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=12, help="a multiple of 4")
    parser.add_argument("--operator", choices=["zero", "mask"], default="zero")
    parser.add_argument("--only-source", action="store_true", help="write the source checkpoint and stop")
    args = parser.parse_args()
    old, new = shape(args.hidden, args.layers), shape(args.hidden * 5 // 4, args.layers * 5 // 4)
    source, grown, copy = (args.folder / name for name in ("source", "grown", "copy"))
    if args.only_source:
        write_view(InitialCheckpoint(old, 1, optimizer=True, dtype=torch.bfloat16), source, {"optimizer_step": 1})
        return
    subprocess.run([sys.executable, *sys.argv, "--only-source"], check=True)  # its memory is not the growth's
    operators = {"hidden": args.operator, "ffn": args.operator, "heads": args.operator, "layers": args.operator}
    plan = make_plan(old, new, GrowthConfig(**operators, layer_selection="interleave"), seed=1)
    view = GrownCheckpoint(open_checkpoint(source), plan)
    nbytes = stored_bytes(view.tensors)
    before, began, cpu = rss_gib(), time.perf_counter(), time.process_time()
    write_grown(view, grown, Processes())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = rss_gib() - before
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(grown), str(copy)], check=True)
    os.sync()
    copied = time.perf_counter() - began
    print(
        f"| {parameter_count(old) / 1e6:.0f} M -> {parameter_count(new) / 1e6:.0f} M | {args.operator} | "
        f"{nbytes / 2**30:.2f} | {seconds:.1f} | {cpu:.1f} | {copied:.1f} | {copied / seconds:.0%} | {memory:.2f} |"
    )
    for path in (source, grown, copy):
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
