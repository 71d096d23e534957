"""What a run file has to satisfy beyond its types, checked before any process starts.

A rule is a function of a few lines that gives one line on what does not fit, with the values and how to mend
them, or None. The rules on one stage live in `model_rules`, `layout_rules` and `schedule_rules`, those on the
run as a whole are here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise

from flm_megatron.config.layout_rules import LAYOUT_RULES, layout_sizes_are_positive
from flm_megatron.config.model_rules import MODEL_RULES, model_sizes_are_positive
from flm_megatron.config.schedule_rules import SCHEDULE_RULES
from flm_megatron.config.schema import RunConfig
from flm_megatron.config.stability_rules import STABILITY_RULES
from flm_megatron.errors import RequestError

STAGE_NAME = re.compile(r"[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*")
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups", "kv_channels")


def check(run: RunConfig, world_size: int | None = None, stages: Collection[str] | None = None) -> None:
    """Check every rule; `world_size` is the number of processes, none where it is not known yet.

    Rules on single stages are checked on those named in `stages` (on all without it).

    Raises:
        RequestError: one line on the first rule that is broken, and how many more are.
    """
    broken = violations(run, world_size, stages)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise RequestError(f"{broken[0]}{more}")


def violations(run: RunConfig, world_size: int | None = None, stages: Collection[str] | None = None) -> list[str]:
    """One line for every broken rule, in the order of the stages; sizes below 1 first, for the rest divides by them."""
    return list(_size_violations(run)) or list(_violations(run, world_size, stages))


def _size_violations(run: RunConfig) -> Iterator[str]:
    if run.data.sequence_length < 1:
        yield f"data.sequence_length is {run.data.sequence_length}, give at least 1"
    for index, stage in enumerate(run.stages):
        for line in (model_sizes_are_positive(stage.model), layout_sizes_are_positive(stage)):
            if line:
                yield f"stages.{index}.{line}"


def _violations(run: RunConfig, world_size: int | None, stages: Collection[str] | None) -> Iterator[str]:
    yield from filter(None, (rule(run) for rule in RUN_RULES))
    for index, stage in enumerate(run.stages):
        if stages is None or stage.name in stages:
            for line in _stage_violations(run, index, world_size):
                yield f"stage {stage.name!r}: {line}"


def _stage_violations(run: RunConfig, index: int, world_size: int | None) -> Iterator[str]:
    stage = run.stages[index]
    yield from filter(None, (rule(stage.model) for rule in MODEL_RULES))
    yield from filter(None, (rule(stage, run.data.sequence_length, world_size) for rule in LAYOUT_RULES))
    yield from filter(None, (rule(run, index) for rule in SCHEDULE_RULES))
    yield from filter(None, (rule(stage.stability) for rule in STABILITY_RULES))


def there_are_stages(run: RunConfig) -> str | None:
    """A run has something to train."""
    return None if run.stages else "stages is empty: give at least one stage"


def stage_names_are_folders(run: RunConfig) -> str | None:
    """Checkpoints lie under a stage's name, and the command line tells names from indices and from paths."""
    for index, stage in enumerate(run.stages):
        if not STAGE_NAME.fullmatch(stage.name):
            return (
                f"stages.{index}.name {stage.name!r} is not fit for a folder: use letters, digits, - and _, "
                "with at least one that is not a digit"
            )
    return None


def stage_names_are_unique(run: RunConfig) -> str | None:
    """Names differ, also on file systems that do not tell capitals."""
    counts = Counter(stage.name.lower() for stage in run.stages)
    twice = [stage.name for stage in run.stages if counts[stage.name.lower()] > 1]
    return f"stages {', '.join(map(repr, twice))} share a name: give each its own" if twice else None


def first_stage_does_not_grow(run: RunConfig) -> str | None:
    """There is nothing before it to grow from."""
    if run.stages and run.stages[0].growth is not None:
        return (
            f"stages.0.growth is given, but stage {run.stages[0].name!r} is the first: leave it out, or start from "
            "weights with checkpoint.initial"
        )
    return None


def other_shapes_grow(run: RunConfig) -> str | None:
    """A later stage of another shape says how it grows."""
    for before, after in pairwise(run.stages):
        changed = [name for name in SHAPE if getattr(before.model, name) != getattr(after.model, name)]
        if changed and after.growth is None:
            name = changed[0]
            return (
                f"stage {after.name!r} has model.{name} {getattr(after.model, name)} after "
                f"{getattr(before.model, name)}, but no growth: add `growth: {{}}`, or give it the same shape"
            )
    return None


def shares_are_all_or_none(run: RunConfig) -> str | None:
    """Weights, and epochs, are given to every source or to none, and not both kinds; each is above 0."""
    sources = run.data.train
    for name in ("weight", "epochs"):
        values = [getattr(source, name) for source in sources]
        given = [value for value in values if value is not None]
        if given and len(given) < len(values):
            missing = sources[values.index(None)].path
            return f"data.train: {name} is given to {len(given)} of {len(values)} sources, but not to {missing!r}"
        if any(value <= 0 for value in given):
            return f"data.train: {name} is {min(given)} for {sources[values.index(min(given))].path!r}, give above 0"
    if any(s.weight is not None for s in sources) and any(s.epochs is not None for s in sources):
        return "data.train: weight and epochs are both given: weights say shares, epochs say passes, give one kind"
    return None


def validation_has_sources(run: RunConfig) -> str | None:
    """A stage that validates needs text to do so."""
    for index, stage in enumerate(run.stages):
        if stage.validation.samples and not run.data.validation:
            return (
                f"stages.{index}.validation.samples is {stage.validation.samples}, but data.validation is empty: "
                "name a dataset, or set samples to 0"
            )
    return None


def validation_names_are_unique(run: RunConfig) -> str | None:
    """Each validation source is reported by its name."""
    names = [source.name or source.path.rstrip("/").split("/")[-1] for source in run.data.validation]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    return f"data.validation has two sources named {twice[0]!r}: give each a name" if twice else None


def z_loss_has_logits(run: RunConfig) -> str | None:
    """The z-loss reads all logits of a micro-batch."""
    for index, stage in enumerate(run.stages):
        if stage.stability.z_loss and run.kernels.head_and_loss == "fused":
            return (
                f"kernels.head_and_loss is fused, but stages.{index}.stability.z_loss is {stage.stability.z_loss}, "
                "which needs all logits: give separate or auto, or set z_loss to 0"
            )
    return None


def intervals_are_counts(run: RunConfig) -> str | None:
    """Numbers of steps, samples and processes are not negative, and at least 1 where 0 has no meaning."""
    least = {
        "checkpoint.interval_steps": (run.checkpoint.interval_steps, 0),
        "checkpoint.keep_last": (run.checkpoint.keep_last, 1),
        "checkpoint.keep_every_steps": (run.checkpoint.keep_every_steps, 0),
        "logging.interval_steps": (run.logging.interval_steps, 1),
        "distributed.timeout_s": (run.distributed.timeout_s, 1),
        "distributed.processes": (run.distributed.processes, 1),
    }
    for index, stage in enumerate(run.stages):
        least[f"stages.{index}.validation.interval_steps"] = (stage.validation.interval_steps, 0)
        least[f"stages.{index}.validation.samples"] = (stage.validation.samples, 0)
    for path, (value, bound) in least.items():
        if value is not None and value < bound:
            return f"{path} is {value}, give at least {bound}"
    return None


RUN_RULES = (
    there_are_stages,
    stage_names_are_folders,
    stage_names_are_unique,
    first_stage_does_not_grow,
    other_shapes_grow,
    shares_are_all_or_none,
    validation_has_sources,
    validation_names_are_unique,
    z_loss_has_logits,
    intervals_are_counts,
)
