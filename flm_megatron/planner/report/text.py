"""A plan as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from flm_megatron.planner.cost.compute import Seconds
from flm_megatron.planner.cost.memory import GIB, RankMemory
from flm_megatron.planner.cost.throughput import StepTime, tflops_per_device
from flm_megatron.planner.goodput import GoodputPlan
from flm_megatron.planner.growth_schedule import GrowthSchedule
from flm_megatron.planner.layout import NEVER
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.plan import Cost, RunPlan, StagePlan
from flm_megatron.planner.search import Candidate, SearchResult, describe
from flm_megatron.training.metrics.flops import CONVENTION
from flm_megatron.training.metrics.log import duration, short

NOTE = f"TFLOP/s and MFU: {CONVENTION}."


def run_text(plan: RunPlan) -> str:
    """All of a plan: stages, totals, where time and memory go, what was assumed."""
    machine = plan.machine
    parts = [f"{plan.gpus} {machine.name}, {machine.node_size} to a node", _stages(plan)]
    if len(plan.stages) > 1 and not plan.shrinks:
        parts.append(_savings(plan))
    parts += [f"Seconds of a step\n{_times(plan.stages)}"]
    sizes = ", ".join(f"{stage.name} {stage.checkpoint_bytes / GIB:,.1f} GiB" for stage in plan.stages)
    parts += [f"A checkpoint: {sizes}"]
    parts += [f"GiB of each pipeline rank of stage {stage.name}\n{_memory(stage)}" for stage in plan.stages]
    parts += [
        f"Not planned: the teacher {stage.teacher} of stage {stage.name}, which takes memory for its weights and its "
        "logits, and time for its forward pass"
        for stage in plan.stages
        if stage.teacher
    ]
    return "\n\n".join([*parts, assumptions(machine), NOTE])


def goodput_text(plans: Sequence[GoodputPlan], machine: Machine, mtbf_gpu_hours: float) -> str:
    """Goodput of every stage, the interval between saves that is best, and what faster saves and restarts are worth."""
    rows = [["stage", "a failure in", "stall", "save", "interval now", "goodput", "best interval", "goodput"]]
    worth = [["GPU-hours saved", "no stall at saves", "saves twice as fast", "restarts twice as fast"]]
    for plan in plans:
        r, now, best = plan.reliability, plan.configured_steps, plan.best_steps
        spans = [duration(r.mtbf_s), f"{r.stall_s:.3g}s", f"{r.save_s:.3g}s"]
        now_text = "at the end" if now is None else f"{now} steps, {duration(now * plan.step_s)}"
        best_text = f"{best} steps, {duration(best * plan.step_s)}"
        rows.append([plan.stage, *spans, now_text, _share(plan.goodput(now)), best_text, _share(plan.goodput(best))])
        faster = ({"stall_s": 0.0}, {"stall_s": r.stall_s / 2, "save_s": r.save_s / 2}, {"restart_s": r.restart_s / 2})
        worth.append([plan.stage, *(f"{plan.saved_gpu_hours(**change):,.0f}" for change in faster)])
    return "\n".join(
        [
            f"With a failure in {mtbf_gpu_hours:,.0f} GPU-hours, {machine.restart_s:g} s to restart, "
            f"{machine.storage_gb_per_s:g} GB/s to storage and {machine.host_gb_per_s:g} GB/s to each host",
            table(rows),
            "",
            table(worth),
        ]
    )


def goodput_data(plans: Sequence[GoodputPlan]) -> dict[str, object]:
    """The same as plain data: seconds, steps, shares."""
    return {
        plan.stage: {
            **asdict(plan.reliability),
            "interval_steps": plan.configured_steps,
            "goodput": plan.goodput(plan.configured_steps),
            "best_interval_steps": plan.best_steps,
            "best_goodput": plan.goodput(plan.best_steps),
            "young_interval_s": plan.reliability.young_interval_s,
        }
        for plan in plans
    }


def _share(value: float) -> str:
    return f"{100 * value:.2f}%"


def search_text(name: str, result: SearchResult, machine: Machine, top: int) -> str:
    """The best layouts of a stage, and why the others were rejected."""
    rows = [["tensor", "pipeline", "chunks", "data", "micro", "recompute", "GiB", "step s", "tok/s/GPU", "TFLOP/s"]]
    rows += [_candidate(candidate) for candidate in result.candidates[:top]]
    title = f"Stage {name}: {len(result.candidates)} layouts fit in {machine.hardware.memory_gib:.1f} GiB"
    reasons = sorted(result.rejections.items(), key=lambda item: -item[1].count)
    lines = [
        f"{item.count:>6} {reason}\n       such as: {item.example}{_gib(item.nearest_gib)}" for reason, item in reasons
    ]
    return "\n".join([title, table(rows), "Rejected", *lines])


def schedule_text(names: Sequence[str], schedule: GrowthSchedule, gpu_hours: Sequence[float]) -> str:
    """Tokens of each stage within a budget."""
    rows = [["stage", "tokens", "GPU-hours", "loss at its end"]]
    for name, tokens, hours, loss in zip(names, schedule.tokens, gpu_hours, schedule.losses, strict=True):
        rows.append([name, short(tokens), f"{hours:,.0f}", f"{loss:.4f}" if tokens else "not worth training"])
    return (
        f"Best use of {schedule.budget:,.0f} GPU-hours: loss {schedule.loss:.4f}; the last size alone reaches "
        f"{schedule.loss_from_scratch:.4f}\n{table(rows)}"
    )


def assumptions(machine: Machine) -> str:
    """What the plan takes for granted; any of it can be changed by a hardware YAML file."""
    hardware, efficiency = machine.hardware, machine.efficiency
    shares = ", ".join(f"{field.name} {getattr(efficiency, field.name):g}" for field in fields(efficiency))
    return "\n".join(
        [
            "Assumed (change any with --hardware FILE)",
            f"  peak {hardware.bf16} TFLOP/s bf16, {hardware.fp8 or 'no'} fp8; memory {hardware.memory_gib} GiB, "
            f"{hardware.bandwidth_gb_per_s} GB/s",
            f"  links per GPU and direction: {machine.intra_gb_per_s:g} GB/s in the node, "
            f"{machine.inter_gb_per_s:g} GB/s between nodes",
            f"  efficiencies ({machine.source}): {shares}; speeds of equal GPUs spread by {100 * machine.spread:g} %",
            f"  held back: {machine.context_gib:g} GiB for the driver, {100 * machine.fragmentation:g} % of "
            "activations and working memory for fragmentation",
            f"  software: {_software(machine)}",
            f"  {machine.power_w:g} W and {machine.price_per_hour:g} {machine.currency} an hour per GPU; "
            "no failures, no checkpoints, no validation",
        ]
    )


def _software(machine: Machine) -> str:
    used = {name.replace("_", " "): value for name, value in asdict(machine.software).items()}
    there = {name: value for name, value in used.items() if value is not False and value != NEVER}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in there.items())


def run_data(plan: RunPlan) -> dict[str, object]:
    """A plan as plain data: bytes, seconds, tokens."""
    return {
        "gpu": plan.machine.name,
        "gpus": plan.gpus,
        "machine": asdict(plan.machine),
        "stages": [_stage_data(stage) for stage in plan.stages],
        "total": _cost_data(plan.total),
        "from_scratch_at_last_size": _cost_data(plan.from_scratch),
        "saving": plan.saving,
        "flops_convention": CONVENTION,
    }


def search_data(result: SearchResult, top: int) -> dict[str, object]:
    """Layouts and rejections as plain data."""
    return {
        "fitting": len(result.candidates),
        "candidates": [_candidate_data(candidate) for candidate in result.candidates[:top]],
        "rejections": {
            reason: {"count": item.count, "example": item.example} for reason, item in result.rejections.items()
        },
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _stages(plan: RunPlan) -> str:
    rows = [
        [
            "stage",
            "params",
            "t x p x v x d",
            "GiB",
            "step s",
            "TFLOP/s",
            "MFU",
            "tokens",
            "days",
            "GPU-hours",
            "MWh",
            plan.machine.currency,
        ]
    ]
    for stage in plan.stages:
        parallel = stage.work.parallel
        layout = f"{parallel.tensor} x {parallel.pipeline} x {parallel.virtual_pipeline} x {stage.work.data}"
        speed = [f"{stage.step.total:.2f}", f"{stage.tflops:.0f}", f"{100 * stage.mfu:.1f}%"]
        rows.append([stage.name, short(stage.parameters), layout, f"{stage.peak_gib:.1f}", *speed, *_cost(stage.cost)])
    if len(plan.stages) > 1:
        rows.append(["total", *[""] * 6, *_cost(plan.total)])
        rows.append(["all at the last size", *[""] * 6, *_cost(plan.from_scratch)])
    return table(rows)


def _savings(plan: RunPlan) -> str:
    return f"Growing saves {100 * plan.saving:.1f} % of the time of training as many tokens at the last size."


def _cost(cost: Cost) -> list[str]:
    return [
        short(cost.tokens),
        f"{cost.days:.2f}",
        f"{cost.gpu_hours:,.0f}",
        f"{cost.energy_mwh:,.0f}",
        f"{cost.money:,.0f}",
    ]


def _times(stages: Sequence[StagePlan]) -> str:
    rows = [["stage", *_time_values(stages[0].step)]]
    return table(
        rows + [[stage.name, *(f"{value:.3g}" for value in _time_values(stage.step).values())] for stage in stages]
    )


def _time_values(step: StepTime) -> dict[str, float]:
    parts = {field.name: getattr(step.compute, field.name) for field in fields(Seconds)}
    return parts | {"pipeline": step.pipeline, "bubble": step.bubble, "data": step.data, "optimizer": step.optimizer}


def _memory(stage: StagePlan) -> str:
    names = [field.name for field in fields(RankMemory)]
    rows = [["rank", "layers", *names, "total"]]
    for rank, memory in enumerate(stage.memory):
        values = [getattr(memory, name) for name in names]
        layers = "+".join(str(count) for count in stage.work.chunks(rank))
        rows.append([str(rank), layers, *(f"{value / GIB:.2f}" for value in [*values, memory.total])])
    return table(rows)


def _candidate(candidate: Candidate) -> list[str]:
    work, parallel = candidate.work, candidate.work.parallel
    sizes = [parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, work.data, work.micro_batch]
    return [
        *(str(size) for size in sizes),
        work.recompute,
        f"{candidate.memory_gib:.1f}",
        f"{candidate.step.total:.2f}",
        f"{candidate.tokens_per_s_per_device:,.0f}",
        f"{tflops_per_device(work, candidate.step.total):.0f}",
    ]


def _gib(gib: float) -> str:
    return "" if gib == float("inf") else f" ({gib:.1f} GiB)"


def _cost_data(cost: Cost) -> dict[str, float]:
    return {**asdict(cost), "days": cost.days}


def _stage_data(stage: StagePlan) -> dict[str, object]:
    work = stage.work
    return {
        "name": stage.name,
        "parameters": stage.parameters,
        "parallel": {**asdict(work.parallel), "data": work.data},
        "checkpoint_bytes": stage.checkpoint_bytes,
        "micro_batch": work.micro_batch,
        "micro_batches": work.micro_batches,
        "recompute": work.recompute,
        "precision": work.precision,
        "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in stage.memory],
        "step_seconds": {**_time_values(stage.step), "total": stage.step.total},
        "tokens_per_s": stage.tokens_per_s,
        "tflops_per_gpu": stage.tflops,
        "mfu": stage.mfu,
        "steps": stage.steps,
        **({"teacher_not_planned": stage.teacher} if stage.teacher else {}),
        **_cost_data(stage.cost),
    }


def _candidate_data(candidate: Candidate) -> dict[str, object]:
    work = candidate.work
    return {
        "layout": describe(work),
        "parallel": {**asdict(work.parallel), "data": work.data},
        "micro_batch": work.micro_batch,
        "recompute": work.recompute,
        "memory_gib": candidate.memory_gib,
        "step_seconds": candidate.step.total,
        "tokens_per_s_per_gpu": candidate.tokens_per_s_per_device,
        "tflops_per_gpu": tflops_per_device(work, candidate.step.total),
    }
