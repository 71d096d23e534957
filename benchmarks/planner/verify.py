"""Every preset and every published row planned and rehearsed: memory, operations and transfers of each role.

    python -m benchmarks.planner.verify [--workers N] [WORD ...]

Prints a Markdown table, `verified.md`; status 1 where operations or transfers differ, or memory by over 2 %. Words
choose the lines whose names have one of them. One rank of every role is rehearsed, through a step of two micro-batches,
or of as many as interleaving takes at a time; `flm plan --verify` rehearses whole steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.planner.compare import table
from benchmarks.planner.rows import Row, time_rows
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.presets import load_preset, preset_names
from flm_megatron.config.rules import violations
from flm_megatron.config.schema import DataConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.layout import CUDA, stage_workload
from flm_megatron.planner.rehearsal.against_plan import RoleCheck, check_role
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.rehearsal.roles import global_rank, roles

MOST = 0.02
"""Share by which planned memory may differ."""
SMALL = ParallelConfig(tensor=2, pipeline=2, sequence=True)
PRECISIONS = {"bf16"}


@dataclass(frozen=True)
class Case:
    """A stage on a number of processes, by all the names that it has."""

    names: tuple[str, ...]
    stage: StageConfig
    sequence_length: int
    world: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step: two, or as many as interleaving takes at a time."""
        parallel = self.stage.parallel
        return parallel.pipeline if parallel.virtual_pipeline > 1 else 2

    def short(self) -> Case:
        """With a step of so few micro-batches."""
        samples = self.world // self.stage.parallel.model_size * self.stage.micro_batch
        return replace(self, stage=replace(self.stage, global_batch=self.micro_batches * samples))

    @property
    def run(self) -> RunConfig:
        """A run of the stage alone."""
        return RunConfig(data=DataConfig(sequence_length=self.sequence_length), stages=[self.stage])

    def layout(self) -> str:
        """Its layout in a few words."""
        parallel, sizes = self.stage.parallel, (self.stage.parallel.tensor, self.stage.parallel.pipeline)
        words = [
            f"{sizes[0]} x {sizes[1]} x {parallel.virtual_pipeline} x {self.world // parallel.model_size}",
            {"none": "", "full": "full", "selective": "selective"}[self.stage.recompute],
            "sequence" if parallel.sequence else "",
            "" if parallel.distributed_optimizer else "replicas",
            "overlap" if parallel.overlap_grad_reduce else "",
            f"{self.micro_batches} micro-batches",
        ]
        return ", ".join(filter(None, words))


def cases() -> tuple[list[Case], list[str]]:
    """What is verified, and a line for every row that this program cannot run."""
    found, left_out = list(_presets()), []
    for row in time_rows():
        if row.work.precision not in PRECISIONS:
            left_out.append(f"{row.name}: trained in {row.work.precision}, which this program plans and does not run")
            continue
        case = _row(row)
        broken = violations(case.run, case.world)
        same = [index for index, one in enumerate(found) if _shape(one) == _shape(case)]
        if broken:
            left_out.append(f"{row.name}: {'; '.join(broken)}")
        elif same and found[same[0]].world == case.world:
            found[same[0]] = replace(found[same[0]], names=(*found[same[0]].names, row.name))
        else:
            found.append(case)
    return found, left_out


def _shape(case: Case) -> tuple[object, ...]:
    """What two cases have in common that differ in replicas alone, or in values that change no size."""
    stage, model = case.stage, case.stage.model
    sizes = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.query_groups)
    kinds = (model.vocab_size, model.normalization, model.activation, model.bias, model.position)
    return (*sizes, *kinds, str(stage.parallel), stage.micro_batch, stage.recompute, case.sequence_length)


def _presets() -> Iterator[Case]:
    """Each under its own layout, and with a few of its layers under three that turn everything else on or off."""
    for name in preset_names():
        fields = load_preset(name)
        if "model" not in fields:  # it comes with a checkpoint
            fields["model"] = load_preset("tele-flm-52b")["model"]
        stage = run_from_dict({"stages": [fields]}, name).stages[0]
        model = replace(stage.model, vocab_size=stage.model.vocab_size or 80_000)
        stage = replace(stage, model=model, name="stage")
        world, sequence = {"tele": (896, 4096), "flm-": (192, 2048)}.get(name[:4], (8, 128))
        world = 512 if stage.global_batch % (world // stage.parallel.model_size) else world
        yield Case((name,), stage, sequence, world)
        if stage.parallel.model_size == 1:
            stage = replace(stage, parallel=SMALL)
        chunks = 2 if stage.parallel.pipeline > 1 else 1
        layers = min(model.num_layers, 2 * stage.parallel.pipeline)
        stage, own = replace(stage, model=replace(model, num_layers=layers)), stage.parallel
        for parallel, recompute in (
            (replace(own, distributed_optimizer=False), "full"),
            (replace(own, virtual_pipeline=chunks), "selective"),
            (replace(own, sequence=False, overlap_grad_reduce=True, overlap_param_gather=True), "none"),
        ):
            few = replace(stage, parallel=parallel, recompute=recompute)  # type: ignore[arg-type]
            yield Case((f"{name}, {layers} layers",), few, sequence, world)


def _row(row: Row) -> Case:
    """A published row as this program runs it: its attention recomputes itself."""
    work = row.work
    stage = StageConfig(
        name="stage",
        model=work.model,
        parallel=replace(work.parallel, data=None),
        micro_batch=work.micro_batch,
        global_batch=work.global_batch,
        precision="bf16",
        recompute="none" if work.recompute == "attention" else work.recompute,
        tokens=work.step_tokens,
    )
    return Case((row.name,), stage, work.sequence_length, work.world_size)


def verify(case: Case) -> list[RoleCheck]:
    """One rank of every role, through a step of few micro-batches."""
    case = case.short()
    stage, parallel = case.stage, case.stage.parallel
    work = stage_workload(stage, case.sequence_length, case.world, CUDA)
    checks = []
    for role in roles(stage.model, parallel):
        rank = global_rank(parallel, case.world, role.pipeline_ranks[0])
        checks.append(check_role(work, rehearse_rank(case.run, stage, rank, case.world), case.names[0], role.name))
    return checks


def _line(case: Case, checks: Sequence[RoleCheck]) -> list[str]:
    widest = max(checks, key=lambda check: abs(check.difference))
    gib = max(check.rehearsed for check in checks) / GIB
    differing = [
        sum(len(getattr(check, name)) for check in checks) for name in ("differing_flops", "differing_traffic")
    ]
    return [
        ", ".join(case.names),
        case.layout(),
        str(len(checks)),
        f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}",
        f"{100 * widest.difference:+.2f} %",
        *("equal" if not count else f"{count} differ" for count in differing),
    ]


def _fails(checks: Sequence[RoleCheck]) -> bool:
    return any(abs(one.difference) > MOST or one.differing_flops or one.differing_traffic for one in checks)


def main() -> int:
    """Print the table; 1 where the plan is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    found, left_out = cases()
    words = arguments.words or [""]
    found = [case for case in found if any(word in name for word in words for name in case.names)]
    begun, lines, failed = time.monotonic(), [], 0
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for case, checks in zip(found, pool.map(verify, found), strict=True):
            lines.append(_line(case, checks))
            failed += _fails(checks)
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    command = " ".join(["python -m benchmarks.planner.verify", *arguments.words])
    print(f"# Planned and rehearsed\n\n    {command}\n")
    print(
        f"{len(found)} stages in {(time.monotonic() - begun) / 60:.0f} minutes; {failed} differ by more than allowed.\n"
    )
    header = ["stage", "t x p x v x d", "roles", "most GiB", "memory planned", "FLOPs", "transfers"]
    print(table(header, lines))
    for line in left_out:
        print(f"\nLeft out: {line}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
