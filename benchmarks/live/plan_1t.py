"""What crosses the boundary from 102B to 1T inside 896 running ranks, from sizes alone: no values, no processes.

    python benchmarks/live/plan_1t.py [RUN.yaml] [--ranks 896]
    python benchmarks/live/plan_1t.py --check 33           # one rank's reads, as the program itself asks for them

Every rank's shards of both stages follow from the layouts, what each new region reads of the old stage from the growth
plan, and the exchange from the plan that the ranks would make. Prints one Markdown table. With --check the growth is
read for all regions of a rank with fake tensors, and what it reads is compared with what the table counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron.checkpoint.exchange.description import Description, NamedRegion
from flm_megatron.checkpoint.exchange.plan import make_plan
from flm_megatron.checkpoint.exchange.refit import rank_shards
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, STATE_PREFIXES, Region
from flm_megatron.checkpoint.regions import flat_regions, split_region
from flm_megatron.checkpoint.without_values import without_values
from flm_megatron.config.loader import load_run, resolve_vocabulary
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.device.chunks import SHARED_READ_BYTES
from flm_megatron.growth.boundary import grown_checkpoint
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.operators import Mean, Old
from flm_megatron.planner.rehearsal.life.stage_checkpoint import StageCheckpoint

GIB = 2**30


def held(stage: StageConfig, rank: int, ranks: int) -> Iterator[NamedRegion]:
    """Weights of a rank, and its range of the optimizer's state: those of a layer behind each other, cut evenly."""
    parallel = stage.parallel
    replicas = ranks // parallel.model_size
    tensor_rank = rank % parallel.tensor
    others = {*rank_shards(stage.model, parallel, rank - tensor_rank, ranks)} if tensor_rank else set()
    regions = [*_layers([p for p in rank_shards(stage.model, parallel, rank, ranks) if p not in others])]
    yield from regions
    total, place = sum(region.numel for _, region in regions), rank // parallel.tensor % replicas
    start, end, at = total * place // replicas, total * (place + 1) // replicas, 0
    for name, region in regions:
        lead = (0,) if len(region.sizes) == 3 else ()
        for sub in flat_regions(region.sizes[len(lead) :], max(0, start - at), min(region.numel, end - at)):
            corner = tuple(a + b for a, b in zip(region.offsets, (*lead, *sub.offsets), strict=True))
            for prefix in STATE_PREFIXES:
                yield prefix + name, Region(corner, ((1,) if lead else ()) + sub.sizes)
        at += region.numel


def _layers(regions: list[NamedRegion]) -> Iterator[NamedRegion]:
    """Regions of one layer each."""
    for name, region in regions:
        for sub in split_region(region, region.numel // region.sizes[0]) if len(region.sizes) == 3 else [region]:
            yield name, sub


def wanted(grown: GrownCheckpoint, stage: StageConfig, rank: int, ranks: int) -> Iterator[list[NamedRegion]]:
    """What a rank reads of the old stage for each region that it fills, as `GrownCheckpoint.read` does."""
    for name, region in _layers(rank_shards(stage.model, stage.parallel, rank, ranks)):
        for prefix in ("", *STATE_PREFIXES):
            for sub in split_region(region, SHARED_READ_BYTES // grown.tensors[prefix + name].dtype.itemsize):
                if reads := [*_reads(grown, prefix, name, sub)]:
                    yield reads


def _reads(grown: GrownCheckpoint, prefix: str, name: str, region: Region) -> Iterator[NamedRegion]:
    for filled in grown.operators.regions(name, region):
        content = filled.content
        if not isinstance(content, Old | Mean):
            continue
        if prefix in (EXP_AVG, EXP_AVG_SQ):
            if isinstance(content, Old) and grown.plan.keeps_moments(content.copy):
                yield prefix + name, content.region
            continue
        same = isinstance(content, Old) and content.scale == 1.0 and content.noise is None
        yield (prefix if same else MASTER) + name, content.region


def boundary(run: RunConfig) -> tuple[StageConfig, StageConfig, GrownCheckpoint]:
    """The second stage, the third, and the growth between them."""
    run = resolve_vocabulary(run, 80_000)
    old = run.stages[1]
    grown, plan = grown_checkpoint(StageCheckpoint(old), run, 2, [0.0] * old.model.num_layers)
    return old, replace(run.stages[2], model=plan.new), grown


class Noting(StageCheckpoint):
    """A source that notes what is read from it."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__(stage)
        self.noted: set[NamedRegion] = set()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Note, and give a tensor without values."""
        assert region is not None, "growth reads regions"
        self.noted.add((name, region))
        return super().read(name, region)


def check(old: StageConfig, new: StageConfig, grown: GrownCheckpoint, rank: int, ranks: int) -> None:
    """Compare what `wanted` counts for a rank with what the growth reads."""
    source = Noting(old)
    view = GrownCheckpoint(source, grown.plan)
    with FakeTensorMode(allow_non_fake_inputs=True), without_values(lambda *_: None):
        for name, region in _layers(rank_shards(new.model, new.parallel, rank, ranks)):
            for prefix in ("", *STATE_PREFIXES):
                for sub in split_region(region, SHARED_READ_BYTES // view.tensors[prefix + name].dtype.itemsize):
                    view.read(prefix + name, sub)
    counted = {each for group in wanted(grown, new, rank, ranks) for each in group}
    assert source.noted == counted, source.noted ^ counted
    print(f"rank {rank}: {len(counted)} regions of the old stage, the same ones")


def main() -> None:
    """Make the plan, and print what every rank sends and receives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", nargs="?", default="examples/tele-flm.yaml")
    parser.add_argument("--ranks", type=int, default=896)
    parser.add_argument("--check", type=int, metavar="RANK")
    args = parser.parse_args()
    old, new, grown = boundary(load_run(args.run_file))
    if args.check is not None:
        return check(old, new, grown, args.check, args.ranks)
    dtypes = {name: info.dtype for name, info in grown.source.tensors.items()}
    described = [
        Description([*held(old, rank, args.ranks)], dtypes, [*wanted(grown, new, rank, args.ranks)])
        for rank in range(args.ranks)
    ]
    packed = sum(len(each.packed()) for each in described)
    began = time.perf_counter()
    traffic = make_plan(described, 0).traffic
    seconds = time.perf_counter() - began
    read = [sum(r.numel * dtypes[n].itemsize for group in each.wanted for n, r in group) for each in described]
    stored = sum(Region.whole(info.shape).numel * info.dtype.itemsize for info in grown.source.tensors.values())
    print(f"| of {args.ranks} ranks | all | most of one | mean |\n|---|---|---|---|")
    for what, values in (("sent", traffic.sent), ("received", traffic.received), ("read from the disk instead", read)):
        total = sum(values) / GIB
        print(f"| {what}, GiB | {total:,.1f} | {max(values) / GIB:.3f} | {total / len(values):.3f} |")
    count = traffic.messages
    print(f"| messages sent | {sum(count):,} | {max(count):,} | {sum(count) / len(count):,.1f} |")
    print(
        f"\n{traffic.rounds} rounds; the old stage is {stored / GIB:,.1f} GiB; descriptions {packed / 2**20:.1f} MiB "
        f"in all; the plan took {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
