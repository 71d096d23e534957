"""What a run file has to satisfy beyond its types, checked before any process starts.

A rule is a function of a few lines that gives one line on what does not fit, with the values and how to fix
them, or None; one that looks at several fields gives a line for each. The rules on one stage live in `model`,
`layout` and `schedule`, those on the run as a whole are here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from flm_megatron.config.ranges import LARGEST_COUNT, LARGEST_SEQUENCE, LARGEST_WORLD, out_of_range
from flm_megatron.config.rules.distillation import DISTILLATION_RULES
from flm_megatron.config.rules.evaluation import EVALUATION_RULES
from flm_megatron.config.rules.layout import LAYOUT_RULES, layout_sizes_are_counts
from flm_megatron.config.rules.model import MODEL_RULES, model_sizes_are_counts
from flm_megatron.config.rules.reporting import REPORTING_RULES
from flm_megatron.config.rules.schedule import SCHEDULE_RULES, STABILITY_RULES, VALUE_RULES
from flm_megatron.config.schema import RunConfig, SourceConfig, StageConfig
from flm_megatron.errors import Mistakes

LARGEST_TIMEOUT_S = 10**7
LARGEST_PASSES, LARGEST_EPOCHS = 10_000, 1_000
SEEDS = 2**63
LONGEST_NAME = 100
STAGE_NAME = re.compile(r"[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*")
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups", "kv_channels")
CHANGES = ("growth", "shrink")
"""Sections of a stage that change the shape of the model before it."""


def check(run: RunConfig, world_size: int | None = None, stages: Collection[str] | None = None) -> None:
    """Check every rule; `world_size` is the number of processes, none where it is not known yet.

    Rules on single stages are checked on those named in `stages` (on all without it).

    Raises:
        Mistakes: one line for every rule that is broken.
    """
    broken = violations(run, world_size, stages)
    if broken:
        raise Mistakes(broken)


def violations(
    run: RunConfig, world_size: int | None = None, stages: Collection[str] | None = None, models: bool = True
) -> list[str]:
    """One line for every broken rule: sizes that are no counts, rules on the run, then on each stage.

    Rules that compute with sizes are left out where one of theirs is no count, or the `models` are not known yet.
    """
    unfit, lines = _sizes(run)
    unfit = unfit if models else set(range(len(run.stages)))
    lines += _lines(rule(run) for rule in RUN_RULES)
    if not unfit:
        lines += _lines(rule(run) for rule in SHAPE_RULES)
    for index, stage in enumerate(run.stages):
        if stages is None or stage.name in stages:
            lines += [f"stage {stage.name!r}: {line}" for line in _stage_violations(run, index, world_size, unfit)]
    return lines


def shape_violations(run: RunConfig) -> list[str]:
    """One line for every broken rule on sizes and on the shapes of models alone."""
    unfit, lines = _sizes(run)
    for index, stage in enumerate(run.stages):
        if index not in unfit:
            lines += [f"stage {stage.name!r}: {line}" for line in _lines(rule(stage.model) for rule in MODEL_RULES)]
    return lines


def _sizes(run: RunConfig) -> tuple[set[int], list[str]]:
    """Stages with sizes that nothing can be computed with, and a line on each of these sizes."""
    lines = out_of_range({"data.sequence_length": (run.data.sequence_length, 1, LARGEST_SEQUENCE)})
    unfit = set(range(len(run.stages))) if lines else set()
    for index, stage in enumerate(run.stages):
        found = [*model_sizes_are_counts(stage.model), *layout_sizes_are_counts(stage)]
        lines += [f"stages.{index}.{line}" for line in found]
        unfit |= {index} if found else set()
    return unfit, lines


def _stage_violations(run: RunConfig, index: int, world_size: int | None, unfit: set[int]) -> list[str]:
    stage = run.stages[index]
    lines = []
    if index not in unfit:
        lines += _lines(rule(stage.model) for rule in MODEL_RULES)
        lines += _lines(rule(stage, run.data.sequence_length, world_size) for rule in LAYOUT_RULES)
    # Where a schedule stands depends on the batches of all stages.
    lines += _lines(rule(run, index) for rule in (VALUE_RULES if unfit else SCHEDULE_RULES))
    return lines + _lines(rule(stage.stability) for rule in STABILITY_RULES)


def _lines(found: Iterable[str | list[str] | None]) -> list[str]:
    """The lines of rules, of which each gives one, several or none."""
    lines: list[str] = []
    for line in found:
        lines += line if isinstance(line, list) else [line] if line else []
    return lines


def there_are_stages(run: RunConfig) -> str | None:
    """A run has something to train."""
    return None if run.stages else "stages is empty: give at least one stage"


def stage_names_are_folders(run: RunConfig) -> list[str]:
    """Checkpoints lie under a stage's name, and the command line tells names from indices and from paths."""
    return [
        f"stages.{index}.name {stage.name!r} is not fit for a folder: use at most {LONGEST_NAME} letters, digits, - "
        "and _, with at least one that is not a digit"
        for index, stage in enumerate(run.stages)
        if not STAGE_NAME.fullmatch(stage.name) or len(stage.name) > LONGEST_NAME
    ]


def stage_names_are_unique(run: RunConfig) -> str | None:
    """Names differ, also on file systems that do not tell capitals."""
    counts = Counter(stage.name.lower() for stage in run.stages)
    twice = [stage.name for stage in run.stages if counts[stage.name.lower()] > 1]
    return f"stages {', '.join(map(repr, twice))} share a name: give each its own" if twice else None


def first_stage_does_not_grow(run: RunConfig) -> list[str]:
    """There is nothing before it to grow or shrink from."""
    return [
        f"stages.0.{change} is given, but stage {run.stages[0].name!r} is the first: leave it out, or start from "
        "weights with checkpoint.initial"
        for change in CHANGES
        if run.stages and getattr(run.stages[0], change) is not None
    ]


def fine_tuning_does_not_grow(run: RunConfig) -> list[str]:
    """The stages of a fine-tuning share one model."""
    return [
        f"stages.{index}.{change} is given, but the stages of a fine-tuning share one model: leave it out"
        for index, stage in enumerate(run.stages)
        for change in CHANGES
        if run.data.chat is not None and index > 0 and getattr(stage, change) is not None
    ]


def stages_grow_or_shrink(run: RunConfig) -> list[str]:
    """A boundary changes the shape in one direction."""
    return [
        f"stages.{index}.growth and stages.{index}.shrink are both given: leave one of the two out"
        for index, stage in enumerate(run.stages)
        if stage.growth is not None and stage.shrink is not None
    ]


def other_shapes_grow(run: RunConfig) -> list[str]:
    """A later stage of another shape says how it grows or shrinks."""
    return [line for before, after in pairwise(run.stages) if (line := change_is_missing(before, after))]


def change_is_missing(before: StageConfig, after: StageConfig) -> str | None:
    """What is said of a stage of another shape that does not say how it gets it; none if nothing is missing."""
    if after.growth is not None or after.shrink is not None:
        return None
    sizes = {name: (getattr(before.model, name), getattr(after.model, name)) for name in SHAPE}
    changed = {name: (old, new) for name, (old, new) in sizes.items() if old != new}
    if not changed:
        return None
    smaller = [name for name, (old, new) in changed.items() if new < old and name != "kv_channels"]
    larger = [name for name, (old, new) in changed.items() if new > old and name != "kv_channels"]
    if smaller and larger:
        less, more = (f"{names[0]} from {sizes[names[0]][0]} to {sizes[names[0]][1]}" for names in (smaller, larger))
        return f"stage {after.name!r} shrinks {less} and grows {more}: use two stages, one for each"
    change, name = ("shrink", smaller[0]) if smaller else ("growth", next(iter(changed)))
    return (
        f"stage {after.name!r} has model.{name} {sizes[name][1]} after {sizes[name][0]}, but no {change}: add "
        f"`{change}: {{}}`, or give it the same shape"
    )


def sequences_have_positions(run: RunConfig) -> list[str]:
    """Learned positions reach to the end of a sequence."""
    length = run.data.sequence_length
    return [
        f"stages.{index}.model.max_positions is {stage.model.max_positions}, below data.sequence_length {length}: "
        "learned positions go no further, give shorter sequences or more positions"
        for index, stage in enumerate(run.stages)
        if (stage.model.max_positions or length) < length
    ]


def shares_are_all_or_none(run: RunConfig) -> str | None:
    """Training sources share the stream by weights, or by epochs."""
    return shares_mistake(run.data.train, "data.train")


def shares_mistake(sources: Sequence[SourceConfig], place: str) -> str | None:
    """Weights, and epochs, are given to every source or to none, and not both kinds; each is above 0."""
    for name in ("weight", "epochs"):
        values = [getattr(source, name) for source in sources]
        given = [value for value in values if value is not None]
        if given and len(given) < len(values):
            missing = sources[values.index(None)].path
            return f"{place}: {name} is given to {len(given)} of {len(values)} sources, but not to {missing!r}"
        if any(value <= 0 for value in given):
            return f"{place}: {name} is {min(given)} for {sources[values.index(min(given))].path!r}, give above 0"
    if any(s.weight is not None for s in sources) and any(s.epochs is not None for s in sources):
        return f"{place}: weight and epochs are both given: weights say shares, epochs say passes, give one kind"
    return None


def validation_has_sources(run: RunConfig) -> list[str]:
    """A stage that validates needs text to do so."""
    return [
        f"stages.{index}.validation.samples is {stage.validation.samples}, but data.validation is empty: "
        "name a dataset, or set samples to 0"
        for index, stage in enumerate(run.stages)
        if stage.validation.samples > 0 and not run.data.validation
    ]


def source_names_are_words(run: RunConfig) -> list[str]:
    """Logs call samples by the names of their sources."""
    return [
        f"data.{split}.{index}.name is {source.name!r}, give a name of letters, digits and the like, or leave it out"
        for split in ("train", "validation")
        for index, source in enumerate(getattr(run.data, split))
        if source.name is not None and not (source.name.strip() and source.name.isprintable())
    ]


def validation_names_are_unique(run: RunConfig) -> str | None:
    """Each validation source is reported by its name."""
    return names_mistake(run.data.validation, "data.validation")


def names_mistake(sources: Sequence[SourceConfig], place: str) -> str | None:
    """No two sources are called the same in logs."""
    names = Counter(source.display_name for source in sources)
    twice = sorted(name for name, count in names.items() if count > 1)
    return f"{place} has two sources named {twice[0]!r}: give each a name" if twice else None


def z_loss_has_logits(run: RunConfig) -> list[str]:
    """The z-loss reads all logits of a micro-batch."""
    return [
        f"kernels.head_and_loss is fused, but stages.{index}.stability.z_loss is {stage.stability.z_loss}, "
        "which needs all logits: give separate or auto, or set z_loss to 0"
        for index, stage in enumerate(run.stages)
        if stage.stability.z_loss and run.kernels.head_and_loss == "fused"
    ]


def intervals_are_counts(run: RunConfig) -> list[str]:
    """Numbers of steps, samples and processes are not negative, and at least 1 where 0 has no meaning."""
    values: dict[str, tuple[int | None, int, int]] = {
        "seed": (run.seed, -SEEDS, SEEDS - 1),
        "checkpoint.interval_steps": (run.checkpoint.interval_steps, 0, LARGEST_COUNT),
        "checkpoint.keep_last": (run.checkpoint.keep_last, 1, LARGEST_COUNT),
        "checkpoint.keep_every_steps": (run.checkpoint.keep_every_steps, 0, LARGEST_COUNT),
        "logging.interval_steps": (run.logging.interval_steps, 1, LARGEST_COUNT),
        "logging.layer_statistics": (run.logging.layer_statistics, 0, LARGEST_COUNT),
        "logging.growth_health": (run.logging.growth_health, 0, LARGEST_COUNT),
        "distributed.timeout_s": (run.distributed.timeout_s, 1, LARGEST_TIMEOUT_S),
        "distributed.processes": (run.distributed.processes, 1, LARGEST_WORLD),
    }
    if run.checkpoint.memory is not None:
        values["checkpoint.memory.interval_steps"] = (run.checkpoint.memory.interval_steps, 1, LARGEST_COUNT)
    for index, stage in enumerate(run.stages):
        values[f"stages.{index}.validation.interval_steps"] = (stage.validation.interval_steps, 0, LARGEST_COUNT)
        values[f"stages.{index}.validation.samples"] = (stage.validation.samples, 0, LARGEST_COUNT)
        values[f"stages.{index}.trainable_seed"] = (stage.trainable_seed, -SEEDS, SEEDS - 1)
    return out_of_range(values)


def memory_budget_is_positive(run: RunConfig) -> list[str]:
    """Copies in memory take some."""
    budget = run.checkpoint.memory.budget_gib if run.checkpoint.memory else None
    if budget is not None and budget <= 0:
        return [f"checkpoint.memory.budget_gib is {budget:g}, give a number above 0, or leave it out"]
    return []


def growth_measures_are_counts(run: RunConfig) -> list[str]:
    """Samples, steps, tolerances and noise of a growth are not negative, factors are in (0, 1]."""
    values: dict[str, tuple[int | None, int, int]] = {}
    lines = []
    for index, stage in enumerate(run.stages):
        if (growth := stage.growth) is None:
            continue
        place = f"stages.{index}.growth"
        values[f"{place}.distance_samples"] = (growth.distance_samples, 1, LARGEST_COUNT)
        values[f"{place}.certify_samples"] = (growth.certify_samples, 0, LARGEST_COUNT)
        values[f"{place}.mask_steps"] = (growth.mask_steps, 0, LARGEST_COUNT)
        values[f"{place}.lr_mult_steps"] = (growth.lr_mult_steps, 1, LARGEST_COUNT)
        for name in ("lr_mult", "new_lr_mult"):
            if getattr(growth, name) <= 0:
                lines.append(f"{place}.{name} is {getattr(growth, name)}, give a number above 0")
        if growth.loss_tolerance is not None and growth.loss_tolerance < 0:
            lines.append(f"{place}.loss_tolerance is {growth.loss_tolerance}, give 0 or more")
        if not growth.clone_noise >= 0:
            lines.append(f"{place}.clone_noise is {growth.clone_noise}, give 0 or more")
        for name in ("rejuvenate", "shrink"):
            factor = getattr(growth, name)
            if factor is not None and not 0 < factor <= 1:
                lines.append(f"{place}.{name} is {factor}, give a factor above 0 and at most 1")
    return out_of_range(values) + lines


def shrink_measures_are_counts(run: RunConfig) -> list[str]:
    """Samples and tolerances of a smaller model are not negative."""
    values: dict[str, tuple[int | None, int, int]] = {}
    lines = []
    for index, stage in enumerate(run.stages):
        if (shrink := stage.shrink) is None:
            continue
        values[f"stages.{index}.shrink.samples"] = (shrink.samples, 1, LARGEST_COUNT)
        values[f"stages.{index}.shrink.certify_samples"] = (shrink.certify_samples, 0, LARGEST_COUNT)
        if shrink.loss_tolerance is not None and not shrink.loss_tolerance >= 0:
            lines.append(f"stages.{index}.shrink.loss_tolerance is {shrink.loss_tolerance}, give 0 or more")
    return out_of_range(values) + lines


def passes_are_bounded(run: RunConfig) -> list[str]:
    """Passes over data are above 0, or not negative where 0 means never, and not beyond reason."""
    lines = [
        f"data.{split}.{index}.epochs is {source.epochs}, give at most {LARGEST_PASSES}"
        for split in ("train", "validation")
        for index, source in enumerate(getattr(run.data, split))
        if source.epochs is not None and source.epochs > LARGEST_PASSES
    ]
    if (chat := run.data.chat) is None:
        return lines
    lines += out_of_range({"data.chat.epochs": (chat.epochs, 1, LARGEST_EPOCHS)})
    return lines + [
        f"data.chat.mix.{index}.passes is {mix.passes}, give 0 to {LARGEST_EPOCHS}"
        for index, mix in enumerate(chat.mix)
        if not 0 <= mix.passes <= LARGEST_EPOCHS
    ]


RUN_RULES = (
    there_are_stages,
    stage_names_are_folders,
    stage_names_are_unique,
    first_stage_does_not_grow,
    fine_tuning_does_not_grow,
    stages_grow_or_shrink,
    shares_are_all_or_none,
    validation_has_sources,
    source_names_are_words,
    validation_names_are_unique,
    z_loss_has_logits,
    intervals_are_counts,
    memory_budget_is_positive,
    growth_measures_are_counts,
    shrink_measures_are_counts,
    passes_are_bounded,
    *DISTILLATION_RULES,
    *EVALUATION_RULES,
    *REPORTING_RULES,
)
SHAPE_RULES = (other_shapes_grow, sequences_have_positions)
"""Those that compute with the sizes of models."""
