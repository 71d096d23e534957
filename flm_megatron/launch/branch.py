"""Decay branches: a copy of a run, from one of its checkpoints on, whose learning rate goes down to its minimum.

A branch is a run of its own, in a folder below the trunk's output. Its run file is the trunk's, shortened and with a
decay that begins at the checkpoint; `checkpoint.branch_of` names the checkpoint. The trunk is only read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from flm_megatron.checkpoint.files.manifest import read_manifest
from flm_megatron.checkpoint.lease.file import LEASE
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.budget import StageBudget, decay_fraction, schedule_start, stage_budgets, warmup_tokens
from flm_megatron.config.ranges import LARGEST_TOKENS
from flm_megatron.config.schema import GrowthConfig, RunConfig, StageConfig
from flm_megatron.durable import replace_file
from flm_megatron.errors import RequestError
from flm_megatron.growth.record import growth_of
from flm_megatron.growth.schedule import lr_multipliers, multiplied_steps
from flm_megatron.launch.run_lease import run_lease
from flm_megatron.optim.learning_rate import learning_rate
from flm_megatron.training.metrics.events import FILE
from flm_megatron.training.metrics.log import lines_up_to
from flm_megatron.training.resume.continuation import past_history, stage_and_step, stage_of
from flm_megatron.training.resume.saved_defaults import with_saved_defaults
from flm_megatron.training.resume.start import Start, checkpoint_store, newest_manifest

FORM = re.compile(r"decay@(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([KMBT]?)")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FOLDER = "branches"
ROUNDING = Fraction(1, 10**6)
"""Part of a step by which the decay may be shorter than its share, which a number of 16 digits gives."""
STABLE_KINDS = ("wsd", "constant")


def branch_tokens(branch: str) -> int:
    """The tokens of `decay@TOKENS`, such as decay@1.5M or decay@3e6.

    Raises:
        RequestError: it is not of this form.
    """
    match = FORM.fullmatch(branch)
    tokens = Fraction(match[1]) * UNITS[match[2]] if match else Fraction(0)
    if tokens.denominator != 1 or not 0 < tokens <= LARGEST_TOKENS:
        raise RequestError(f"branch {branch!r:.60} is not of the form decay@TOKENS, such as decay@1.5M or decay@3e6")
    return int(tokens)


def decay_branch(run: RunConfig, branch: str, anew: bool = False) -> RunConfig:
    """The run that is `branch` (decay@TOKENS) of `run`: its stages up to the checkpoint at TOKENS, then the decay.

    The decay is `wsd_decay_fraction` of the tokens from the start of the schedule to its end, in whole steps. A branch
    that has checkpoints is known from these, whether the trunk keeps the first one or not, unless it begins `anew`.

    Raises:
        RequestError: there is no checkpoint at TOKENS, the schedule is not in its stable phase there, a growth's
            multipliers still change the learning rate, `run` is itself a branch or a fine-tuning.
    """
    tokens = branch_tokens(branch)
    if run.checkpoint.branch_of is not None:
        raise RequestError(f"{run.name} is itself a branch (of {run.checkpoint.branch_of}): branch from its trunk")
    if run.data.chat is not None:
        raise RequestError("a fine-tuning (data.chat) has no branches: they are of runs on text")
    run = with_saved_defaults(run)
    output = Path(run.output) / FOLDER / f"decay@{tokens}"
    manifest = Manifest() if anew else newest_manifest(replace(run, output=str(output)))
    recorded = _recorded_source(manifest)
    source = recorded or _kept_checkpoint(run, tokens)
    if recorded is None:
        manifest = read_manifest(source) or manifest
    past = past_history(run, manifest, str(source))
    index = stage_of(run, manifest, past, str(source))
    if recorded is None:
        _check_multipliers(run.stages[index], manifest, tokens)
    return replace(
        run,
        name=f"{run.name} decay@{tokens}",
        output=str(output),
        stages=_decaying_stages(run, index, tokens, stage_budgets(run, past)),
        checkpoint=replace(run.checkpoint, branch_of=str(source)),
    )


def _recorded_source(manifest: Manifest) -> Path | None:
    """The checkpoint that a checkpoint of a branch says it started from."""
    section = manifest.run.saved.get("checkpoint")
    source = section.get("branch_of") if isinstance(section, dict) else None
    return Path(source) if isinstance(source, str) else None


def _kept_checkpoint(run: RunConfig, tokens: int) -> Path:
    """The checkpoint of the run at `tokens`; the newest where a step was saved more than once.

    Raises:
        RequestError: there is none; the nearest that are kept are named.
    """
    store, newest = checkpoint_store(run), newest_manifest(run)
    if newest.position.stage is None:
        raise RequestError(f"{store.root} has no checkpoint: train the run first, then its branches")
    budgets = stage_budgets(run, past_history(run, newest, str(store.root)))
    kept: dict[int, Path] = {}
    for stage, budget in zip(run.stages, budgets, strict=True):
        for path in store.newest(stage.name):
            kept.setdefault(budget.tokens_at(store.step_of(path)), path)
    if tokens in kept:
        return kept[tokens]
    if tokens > budgets[-1].end_token:
        raise RequestError(f"decay@{tokens} lies beyond the run, which ends at {budgets[-1].end_token:,} tokens")
    nearest = [*sorted(at for at in kept if at < tokens)[-1:], *sorted(at for at in kept if at > tokens)[:1]]
    raise RequestError(
        f"{store.root} keeps no checkpoint at {tokens:,} tokens, the nearest is at "
        f"{' and '.join(f'{at:,}' for at in nearest)}: branch there, or let checkpoint.keep_every_steps keep more"
    )


def _decaying_stages(run: RunConfig, index: int, tokens: int, budgets: Sequence[StageBudget]) -> list[StageConfig]:
    """The stages up to number `index`, which ends with a decay that begins at `tokens` of the run."""
    anchor, stage = schedule_start(run.stages, index), run.stages[index]
    _check_stable(run, index, tokens, budgets)
    share, first = Fraction(str(decay_fraction(run.stages[anchor].schedule))), budgets[anchor].first_token
    if share >= 1:
        raise RequestError("schedule.wsd_decay_fraction is 1: a branch needs a share below 1 for its decay")
    step_tokens = stage.global_batch * run.data.sequence_length
    decay = step_tokens * math.ceil(share / (1 - share) * (tokens - first) / step_tokens - ROUNDING)
    fraction = decay / (tokens + decay - first)
    schedules = [
        replace(each.schedule, kind="wsd", decay_tokens=None, wsd_decay_fraction=fraction)
        for each in run.stages[anchor : index + 1]
    ]
    if stage.schedule.warmup_samples is None:  # which does not follow the length of the stage
        begun = budgets[index].segments[0]
        warmup = warmup_tokens(stage, begun.sequence_length, begun.global_batch)
        schedules[-1] = replace(schedules[-1], warmup_tokens=warmup)
    stages = [replace(each, schedule=new) for each, new in zip(run.stages[anchor:], schedules, strict=False)]
    stages[-1] = replace(stages[-1], tokens=tokens + decay - budgets[index].first_token)
    return [*run.stages[:anchor], *stages]


def _check_stable(run: RunConfig, index: int, tokens: int, budgets: Sequence[StageBudget]) -> None:
    """Raise RequestError if the learning rate at `tokens` is not the peak that a schedule stays at."""
    stage, kind = run.stages[index], run.stages[schedule_start(run.stages, index)].schedule.kind
    if kind not in STABLE_KINDS:
        raise RequestError(
            f"stage {stage.name!r} has a {kind} schedule, which has no stable phase to branch from: use wsd or constant"
        )
    rate, peak = learning_rate(tokens, run, index, budgets), stage.optimizer.lr
    if rate != peak:
        raise RequestError(
            f"the schedule is not in its stable phase at {tokens:,} tokens: the learning rate of stage {stage.name!r} "
            f"is {rate:.3g} there, on its way to or from {peak:.3g}; branch between warm-up and decay"
        )


def _check_multipliers(stage: StageConfig, manifest: Manifest, tokens: int) -> None:
    """Raise RequestError if the growth's multipliers would change the learning rate in the decay."""
    record, step = growth_of(manifest), stage_and_step(manifest)[1]
    growth = stage.growth or GrowthConfig()
    if record is None or lr_multipliers(growth, record.plan, step) == (1, 1):
        return
    raise RequestError(
        f"growth.lr_mult and new_lr_mult of stage {stage.name!r} still change the learning rate at {tokens:,} tokens, "
        f"its step {step}: branch from its step {multiplied_steps(growth, record.plan)} on, where both are 1"
    )


def require_no_branch_in_training(run: RunConfig) -> None:
    """Check that no branch of the run is being trained, so that it can be set aside. For one process.

    Raises:
        RequestError: one is.
    """
    for held in sorted((Path(run.output) / FOLDER).glob(f"*/{LEASE}")):
        with run_lease(replace(run, output=str(held.parent))):
            pass


def bring_metrics(run: RunConfig, start: Start | None) -> None:
    """Begin the metrics of a branch with those of its trunk, up to the checkpoint that it starts from.

    Does nothing for other runs, nor for a branch that has metrics or checkpoints of its own. For one process.
    """
    target, source = Path(run.output) / FILE, run.checkpoint.branch_of
    if source is None or start is None or start.source != Path(source) or target.exists():
        return
    trunk = Path(source).parents[2] / FILE
    if trunk.is_file():
        names = [stage.name for stage in run.stages]
        lines = lines_up_to(trunk, names, names[start.stage], start.step)
        replace_file(target, "".join(line + "\n" for line in lines).encode())
