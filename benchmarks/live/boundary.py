"""A stage boundary crossed over the disk and inside the ranks, with the model of a run file and gloo.

    torchrun --nproc-per-node 4 benchmarks/live/boundary.py [RUN.yaml] [--repeats 5]

The run's first stage, with random weights, masters and moments, is saved under tensor 2 x pipeline 2; its second stage,
grown from it, is loaded under pipeline 2 x data 2 from the checkpoint and from the memory of the ranks, in turn. Both
have the same bits. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.live import LiveCheckpoint
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import held_state, load_live_state, load_state, save_state
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.loader import load_run, resolve_vocabulary
from flm_megatron.config.schema import ParallelConfig, RunConfig
from flm_megatron.distributed.channels import broadcast, gathered
from flm_megatron.distributed.world import is_main_rank, layout, world
from flm_megatron.growth.boundary import grown_checkpoint
from flm_megatron.planner.rehearsal.life.counted import Counted, total
from flm_megatron.training.step import TrainState

MIB = 2**20
OLD, NEW = ParallelConfig(tensor=2, pipeline=2), ParallelConfig(pipeline=2, data=2)


def measure(run: RunConfig, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, of the save, and MiB, by what is measured."""
    old, timeout_s = replace(run.stages[0], parallel=OLD), run.distributed.timeout_s
    found: dict[str, list[float]] = {}
    with layout(OLD, timeout_s):
        state = TrainState(old, run.data.sequence_length)
        load_state(InitialCheckpoint(old.model, 1, optimizer=True), state.chunks, state.optimizer)
        for name, _, tensor in held_state(state.chunks, state.optimizer):
            if name.startswith("optimizer.state.exp_avg"):
                tensor.uniform_(0.0, 1.0)
        began = time.perf_counter()
        manifest = stage_manifest(run, 0, old.model, StagePosition(1, optimizer_step=1, stage=old.name))
        save_state(folder / "old", state.chunks, state.optimizer, manifest).wait()
        found["save"] = [time.perf_counter() - began]
        held = held_state(state.chunks, state.optimizer)
    for _ in range(repeats):
        cross(run, folder / "old", held, found)
    return found


def cross(run: RunConfig, saved: Path, held: list, found: dict[str, list[float]]) -> None:
    """Load the second stage each way, compare, and note what it took."""
    source = Counted(open_checkpoint(saved))
    live = LiveCheckpoint(source.source, held)
    grown, plan = grown_checkpoint(source, run, 1)
    new = replace(run.stages[1], parallel=NEW, model=plan.new)
    with layout(NEW, run.distributed.timeout_s):
        states = [TrainState(new, run.data.sequence_length) for _ in range(2)]
        dist.barrier()
        began = time.perf_counter()
        load_state(grown, states[0].chunks, states[0].optimizer)
        dist.barrier()
        between = time.perf_counter()
        crossing = load_live_state(grown_checkpoint(live, run, 1)[0], states[1].chunks, states[1].optimizer)
        dist.barrier()
        ended = time.perf_counter()
        both = [held_state(state.chunks, state.optimizer) for state in states]
        assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(*both, strict=True)), "other bits"
    note = {
        "disk": between - began,
        "live": ended - between,
        "on the way": crossing.exchange_s,
        "read MiB": sum(gathered(total(source.tensors_read.values()).nbytes)) / MIB,
        "sent MiB": sum(crossing.traffic.sent) / MIB,
        "most sent MiB": max(crossing.traffic.sent) / MIB,
        "messages": sum(crossing.traffic.messages),
    }
    for name, value in note.items():
        found.setdefault(name, []).append(value)


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", nargs="?", default="examples/tiny.yaml")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    run = load_run(args.run_file)
    run = resolve_vocabulary(replace(run, tokenizer=None), 4096)
    with world(run.distributed), tempfile.TemporaryDirectory() as made:
        found = {name: median(values) for name, values in measure(run, Path(broadcast(made)), args.repeats).items()}
        dist.barrier()
        if not is_main_rank():
            return
        print("| way | s | MiB moved | note |\n|---|---|---|---|")
        print(f"| disk | {found['disk']:.3f} | {found['read MiB']:.1f} read | saved in {found['save']:.3f} s before |")
        print(
            f"| ranks | {found['live']:.3f} | {found['sent MiB']:.1f} sent | {found['on the way']:.3f} s of them on "
            f"the way, {found['messages']:.0f} messages, at most {found['most sent MiB']:.1f} MiB from one rank |"
        )


if __name__ == "__main__":
    main()
