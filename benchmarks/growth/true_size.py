"""One rank's shard of the grown 1T model at true shapes, computed on a CPU without the 102B checkpoint.

    python benchmarks/growth/true_size.py [--operator zero|mask] [--optimizer] TENSOR_RANK PIPELINE_RANK
    python benchmarks/growth/true_size.py --count

An InitialCheckpoint of the 102B shape stands in for the trained model. The shard is held as the rank would hold it: up
to 2.4 GiB, with --optimizer (fp32 masters and both moments) 16 GiB. Prints one Markdown table row.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import STATE_PREFIXES, Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import GrowthConfig, ParallelConfig
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.operators import Old
from flm_megatron.growth.plan import make_plan
from flm_megatron.planner.rehearsal.life.counted import Counted, total

RUN_FILE = "examples/tele-flm.yaml"
PARALLEL = ParallelConfig(tensor=32, pipeline=28)


def rss_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fill(checkpoint: GrownCheckpoint, name: str, region: Region) -> torch.Tensor:
    """Compute a region, 8 MiB at a time."""
    held = torch.empty(region.sizes, dtype=checkpoint.tensors[name].dtype)
    for sub in split_region(region, BUFFER_BYTES // held.dtype.itemsize):
        held[sub.within(region).slices] = checkpoint.read(name, sub)
    return held


def count(checkpoint: GrownCheckpoint) -> None:
    """Values that all ranks hold, and those of them that come from the old model, from the plan alone."""
    held, old, most = 0, 0, 0
    for tensor_rank in range(PARALLEL.tensor):
        for pipeline_rank in range(PARALLEL.pipeline):
            parts = rank_regions(checkpoint.plan.new, PARALLEL, tensor_rank, pipeline_rank)
            filled = [
                p for name, regions in parts.items() for r in regions for p in checkpoint.operators.regions(name, r)
            ]
            held += sum(one.region.numel for one in filled)
            mine = sum(one.content.region.numel for one in filled if isinstance(one.content, Old))
            old, most = old + mine, max(most, mine)
    print(f"all ranks: {held:,} values, {old:,} of them old; at most {most:,} old ones on a rank")


def main() -> None:
    """Compute one rank's shard and report it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tensor_rank", type=int, nargs="?", default=0)
    parser.add_argument("pipeline_rank", type=int, nargs="?", default=0)
    parser.add_argument("--count", action="store_true", help="count values over all ranks, computing none")
    parser.add_argument("--operator", choices=["zero", "mask"], default="zero")
    parser.add_argument("--optimizer", action="store_true")
    args = parser.parse_args()
    old, new = (stage.model for stage in load_run(RUN_FILE).stages[-2:])
    operators = {"hidden": args.operator, "ffn": args.operator, "heads": args.operator, "layers": args.operator}
    growth = GrowthConfig(**operators, layer_selection="interleave", mask_steps=1000)
    source = Counted(InitialCheckpoint(old, 1, optimizer=args.optimizer, dtype=torch.bfloat16))
    checkpoint = GrownCheckpoint(source, make_plan(old, new, growth, seed=1, stage="1t"))
    if args.count:
        count(checkpoint)
        return
    regions = rank_regions(new, PARALLEL, args.tensor_rank, args.pipeline_rank)
    before, began, cpu = rss_gib(), time.perf_counter(), time.process_time()
    shard = [
        fill(checkpoint, prefix + name, region)
        for prefix in ("", *(STATE_PREFIXES if args.optimizer else ()))
        for name, parts in regions.items()
        for region in parts
    ]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    what = "weights, masters, moments" if args.optimizer else "weights"
    read = total(source.tensors_read.values()).nbytes
    size, peak = sum(held.nbytes for held in shard) / 2**30, rss_gib() - before
    print(
        f"| {args.tensor_rank} / {args.pipeline_rank} | {args.operator} | {what} | {size:.2f} | "
        f"{read / 2**30:.2f} | {seconds:.0f} | {cpu:.0f} | {peak:.2f} | {peak - size:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
