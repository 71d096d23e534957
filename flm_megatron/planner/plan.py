"""Stages and whole runs: memory, time, energy and money."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flm_megatron.config.budget import stage_steps
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.cost.matmul import peak_flops
from flm_megatron.planner.cost.memory import GIB, RankMemory, all_rank_memory
from flm_megatron.planner.cost.throughput import StepTime, step_time, tflops_per_device
from flm_megatron.planner.layout import Workload, stage_workload
from flm_megatron.planner.machine import Machine

HOUR, DAY = 3600.0, 86400.0
OPTIMIZER_BYTES = 12  # a checkpoint holds an fp32 master and two moments of each parameter besides its weight


@dataclass(frozen=True)
class Cost:
    """What a number of tokens takes on all accelerators together."""

    tokens: float
    seconds: float
    gpu_hours: float
    energy_mwh: float
    money: float

    @property
    def days(self) -> float:
        """Days of uninterrupted training."""
        return self.seconds / DAY

    def __add__(self, other: Cost) -> Cost:
        """The cost of two stages, one after the other."""
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class StagePlan:
    """One stage under one layout on one machine."""

    name: str
    work: Workload
    parameters: int
    memory: list[RankMemory]
    step: StepTime
    tflops: float
    mfu: float
    steps: int
    cost: Cost
    teacher: str | None = None
    """The teacher that the stage learns from, which is not planned."""

    @property
    def peak_gib(self) -> float:
        """Memory of the pipeline rank that needs most."""
        return max(memory.total for memory in self.memory) / GIB

    @property
    def checkpoint_bytes(self) -> int:
        """Tensors of one checkpoint of the stage, optimizer included."""
        return checkpoint_bytes(self.parameters, self.work.bytes)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all accelerators."""
        return self.work.step_tokens / self.step.total


@dataclass(frozen=True)
class RunPlan:
    """All stages, their sum, and the same number of tokens trained at the last stage's size from scratch."""

    machine: Machine
    gpus: int
    stages: list[StagePlan]
    total: Cost
    from_scratch: Cost

    @property
    def shrinks(self) -> bool:
        """Whether a stage is smaller than the one before: then growing is not what is compared."""
        return any(after.parameters < before.parameters for before, after in pairwise(self.stages))

    @property
    def saving(self) -> float:
        """Share of the time from scratch that growing saves."""
        return 1 - self.total.seconds / self.from_scratch.seconds if self.from_scratch.seconds else 0.0


def checkpoint_bytes(parameters: int, weight_bytes: int) -> int:
    """Tensors of a checkpoint of `parameters` parameters, optimizer included."""
    return parameters * (weight_bytes + OPTIMIZER_BYTES)


def plan_run(run: RunConfig, machine: Machine, gpus: int) -> RunPlan:
    """Plan every stage under the layout of the run file, which its rules allow; memory is not judged here."""
    stages = [plan_stage(stage, run.data.sequence_length, machine, gpus) for stage in run.stages]
    total = sum((stage.cost for stage in stages[1:]), stages[0].cost)
    final = stages[-1]
    seconds = total.tokens / final.tokens_per_s
    return RunPlan(machine, gpus, stages, total, cost(machine, gpus, total.tokens, seconds))


def plan_stage(stage: StageConfig, sequence_length: int, machine: Machine, gpus: int) -> StagePlan:
    """Plan one stage on `gpus` accelerators."""
    work = stage_workload(stage, sequence_length, gpus, machine.software)
    step = step_time(work, machine)
    steps = stage_steps(stage, sequence_length)
    tflops = tflops_per_device(work, step.total)
    return StagePlan(
        name=stage.name,
        work=work,
        parameters=parameter_count(stage.model),
        memory=all_rank_memory(work, machine.context_gib, machine.fragmentation),
        step=step,
        tflops=tflops,
        mfu=tflops * 1e12 / peak_flops(machine, work.precision),
        steps=steps,
        cost=cost(machine, gpus, steps * work.step_tokens, steps * step.total),
        teacher=stage.distill.teacher if stage.distill else None,
    )


def cost(machine: Machine, gpus: int, tokens: float, seconds: float) -> Cost:
    """Cost of `seconds` on `gpus` accelerators."""
    hours = gpus * seconds / HOUR
    return Cost(tokens, seconds, hours, hours * machine.power_w / 1e6, hours * machine.price_per_hour)
