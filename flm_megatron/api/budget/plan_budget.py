"""How many tokens to give each stage of a run out of a budget of accelerator hours."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.api.plan import check_layouts, planned_on
from flm_megatron.api.values import require_above_zero
from flm_megatron.config.schema import RunConfig
from flm_megatron.paths import FilePath, given_path
from flm_megatron.planner.growth_schedule import GrowthSchedule, best_schedule
from flm_megatron.planner.loss_law import LossLaw, chinchilla_law, read_laws
from flm_megatron.planner.plan import HOUR, plan_run
from flm_megatron.planner.report.text import schedule_text


@dataclass(frozen=True)
class BudgetPlan:
    """The best use of a budget. `str(plan)` is the report of `flm plan --budget`, `to_dict()` that of `--json`."""

    stages: list[str]
    schedule: GrowthSchedule
    """Tokens of each stage, and the loss at its end."""
    gpu_hours: list[float]
    """Of each stage."""
    laws: list[LossLaw]
    """Loss by tokens of each stage."""

    def __str__(self) -> str:
        """The report."""
        return schedule_text(self.stages, self.schedule, self.gpu_hours)

    def to_dict(self) -> dict[str, object]:
        """Plain data: tokens, GPU-hours, loss in nats."""
        keys = ("tokens", "gpu_hours", "loss")
        rows = zip(self.schedule.tokens, self.gpu_hours, self.schedule.losses, strict=True)
        return {
            "stages": {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.stages, rows, strict=True)},
            "loss_from_scratch": self.schedule.loss_from_scratch,
            "laws": {name: vars(law) for name, law in zip(self.stages, self.laws, strict=True)},
        }


def plan_budget(
    run: RunConfig,
    budget: float,
    *,
    gpu: str,
    gpus: int,
    laws: FilePath | None = None,
    stage: str | None = None,
    nodes_of: int | None = None,
    hardware: FilePath | None = None,
) -> BudgetPlan:
    """Divide a budget of accelerator hours over the stages of a run so that the last loss is the least.

    `laws` is a YAML file of loss laws by stage (floor, scale and exponent, or the path of a metrics.jsonl); those of
    arXiv 2203.15556 stand in for stages that it leaves out. The rest is as with `plan`.

    Raises:
        RequestError: as with `plan`, but for memory; or the laws cannot be read, or the budget is not above 0.
    """
    require_above_zero("budget", budget)
    run, machine = planned_on(run, gpu, gpus, stage, nodes_of, hardware)
    check_layouts(run, gpus)
    stages = plan_run(run, machine, gpus).stages
    names = [planned.name for planned in stages]
    given = {} if laws is None else read_laws(given_path(laws, "laws"), names)
    chosen = [given.get(planned.name) or chinchilla_law(planned.parameters) for planned in stages]
    hours = [gpus / planned.tokens_per_s / HOUR for planned in stages]  # GPU-hours of a token
    schedule = best_schedule(chosen, hours, budget)
    spent = [tokens * cost for tokens, cost in zip(schedule.tokens, hours, strict=True)]
    return BudgetPlan(names, schedule, spent, chosen)
