"""Rules on optimizer, learning rate, token budget and steps that go wrong.

Each says in one line what does not fit, or gives None; one that looks at several fields gives a line for each.
They take the run and the index of the stage, for a schedule may start in an earlier stage; those on steps that go
wrong take their section.
"""

from __future__ import annotations

from flm_megatron.config.budget import schedule_start, schedule_tokens, stage_budgets, warmup_tokens
from flm_megatron.config.ranges import LARGEST_COUNT, LARGEST_TOKENS, out_of_range, shown
from flm_megatron.config.schema import RunConfig, ScheduleConfig, StabilityConfig

LARGEST_WINDOW = 10**6
SPANS = {"warmup_tokens": 0, "warmup_samples": 0, "power_start_tokens": 0, "decay_tokens": 1}
SHAPE = ("kind", "decay_tokens", "wsd_decay_fraction", "power_exponent", "power_start_tokens")


def budget_is_positive(run: RunConfig, index: int) -> str | None:
    """A stage trains on something, and ends."""
    tokens = run.stages[index].tokens
    if tokens > LARGEST_TOKENS:
        return f"tokens is {shown(tokens)}, give at most {LARGEST_TOKENS}"
    return None if tokens > 0 else f"tokens is {shown(tokens)}, give the stage a budget"


def learning_rates_are_ordered(run: RunConfig, index: int) -> list[str]:
    """0 < lr, 0 <= min_lr <= lr, 0 < matrix_lr."""
    options = run.stages[index].optimizer
    lines = [
        f"optimizer.{name} is {value}, give a number above 0"
        for name, value in (("lr", options.lr), ("matrix_lr", options.matrix_lr))
        if value is not None and value <= 0
    ]
    if options.lr > 0 and not 0 <= options.min_lr <= options.lr:
        lines.append(f"optimizer.min_lr {options.min_lr} does not lie between 0 and lr {options.lr}")
    return lines


def adam_is_bounded(run: RunConfig, index: int) -> list[str]:
    """Betas in [0, 1), eps above 0, weight decay and clipping not negative."""
    options = run.stages[index].optimizer
    lines = []
    if not all(0 <= beta < 1 for beta in options.betas):
        lines.append(f"optimizer.betas {list(options.betas)} do not lie in [0, 1)")
    for name in ("eps", "eps_relative"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            lines.append(f"optimizer.{name} is {value}, give a number above 0")
    for name in ("weight_decay", "clip_grad"):
        if getattr(options, name) < 0:
            lines.append(f"optimizer.{name} is {getattr(options, name)}, give 0 or more")
    return lines


def spans_are_positive(run: RunConfig, index: int) -> list[str]:
    """Lengths of the schedule's parts make sense by themselves."""
    schedule = run.stages[index].schedule
    counts = {f"schedule.{name}": (getattr(schedule, name), least, LARGEST_TOKENS) for name, least in SPANS.items()}
    lines = out_of_range(counts)
    if schedule.wsd_decay_fraction is not None and not 0 < schedule.wsd_decay_fraction <= 1:
        lines.append(f"schedule.wsd_decay_fraction is {schedule.wsd_decay_fraction}, give a share above 0 and up to 1")
    if schedule.power_exponent >= 0:
        lines.append(f"schedule.power_exponent is {schedule.power_exponent}, give a number below 0")
    return lines


def warmup_has_one_unit(run: RunConfig, index: int) -> str | None:
    """Tokens or samples, not both."""
    schedule = run.stages[index].schedule
    if schedule.warmup_samples is not None and schedule.warmup_tokens:
        return (
            f"schedule.warmup_tokens {schedule.warmup_tokens} and warmup_samples {schedule.warmup_samples} "
            "are both given: give one of the two"
        )
    return None


def warmup_fits_stage(run: RunConfig, index: int) -> str | None:
    """A warm-up ends within its stage, and before the schedule does. Under `continue` a later stage has none."""
    stage, anchor = run.stages[index], schedule_start(run.stages, index)
    if index > anchor and stage.schedule.boundary == "continue":
        return None
    budget = stage_budgets(run)[index]
    warmup = warmup_tokens(stage, run.data.sequence_length, stage.global_batch)
    stage_tokens = budget.end_token - budget.first_token
    if warmup > stage_tokens:
        return f"schedule: the warm-up of {warmup} tokens is longer than the stage's {stage_tokens}: shorten it"
    if index == anchor and warmup > schedule_tokens(run, anchor):
        return f"schedule: the warm-up of {warmup} tokens is longer than decay_tokens {stage.schedule.decay_tokens}"
    return None


def power_has_a_start(run: RunConfig, index: int) -> str | None:
    """A power of tokens leaves the peak at a positive number of tokens, not before the warm-up ends."""
    schedule = run.stages[index].schedule
    if schedule.kind != "power":
        return None
    warmup = warmup_tokens(run.stages[index], run.data.sequence_length, run.stages[index].global_batch)
    start = warmup if schedule.power_start_tokens is None else schedule.power_start_tokens
    if start < max(1, warmup):
        return (
            f"schedule.power_start_tokens is {start} with a warm-up of {warmup} tokens: the power law starts at the "
            "end of the warm-up or later, and not at 0"
        )
    return None


def continued_shape_is_one(run: RunConfig, index: int) -> str | None:
    """A stage that continues a schedule cannot change its shape: that is given where the schedule starts."""
    anchor = schedule_start(run.stages, index)
    here, there = run.stages[index].schedule, run.stages[anchor].schedule
    default = ScheduleConfig()
    for name in SHAPE:
        value = getattr(here, name)
        if value not in (getattr(default, name), getattr(there, name)):
            return (
                f"schedule.{name} is {value}, but boundary {here.boundary!r} goes on with the schedule of stage "
                f"{run.stages[anchor].name!r}: leave it out here, or set boundary to 'restart'"
            )
    return None


VALUE_RULES = (
    budget_is_positive,
    learning_rates_are_ordered,
    adam_is_bounded,
    spans_are_positive,
    warmup_has_one_unit,
    power_has_a_start,
    continued_shape_is_one,
)
"""Those that hold whatever the batches are."""
SCHEDULE_RULES = (*VALUE_RULES, warmup_fits_stage)


def watching_is_bounded(stability: StabilityConfig) -> list[str]:
    """Counts and factors are not negative; a window has a spread, and fits into memory."""
    negative = [
        f"stability.{name} is {getattr(stability, name)}, give at least 0"
        for name in ("sigmas", "z_loss")
        if getattr(stability, name) < 0
    ]
    counts = {
        "stability.window_steps": (stability.window_steps, 4, LARGEST_WINDOW),
        "stability.max_in_a_row": (stability.max_in_a_row, 1, LARGEST_COUNT),
        "stability.new_level_steps": (stability.new_level_steps, 0, LARGEST_COUNT),
        "stability.checksum_interval_steps": (stability.checksum_interval_steps, 0, LARGEST_COUNT),
    }
    return negative + out_of_range(counts)


def shrink_is_a_share(stability: StabilityConfig) -> str | None:
    """The embedding's gradient is made smaller, not larger or negative."""
    factor = stability.embedding_gradient_shrink
    return None if 0 <= factor <= 1 else f"stability.embedding_gradient_shrink is {factor}, give 0 to 1"


STABILITY_RULES = (watching_is_bounded, shrink_is_a_share)
