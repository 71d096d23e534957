"""Checks and fills in a run file before any process starts and anything is written.

The rules of the run file, kernels, tokenizer and data, and where training begins. Checks without torch come first, as
its import takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.schema import RunConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.errors import Mistakes, RequestError, refuse_together
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.paths import require_folder
from flm_megatron.storage.store import filesystem
from flm_megatron.url import is_url


def resolve(run: RunConfig, start_anew: bool = False) -> RunConfig:
    """The run with its vocabulary filled in from the tokenizer, and its data checked.

    With `start_anew` it begins at `checkpoint.initial` even if it has checkpoints of its own.

    Raises:
        Mistakes: broken rules; or no tokenizer, no data, data made with another tokenizer, shorter than a sample or
            than the budgets; or kernels, FP8 or Transformer Engine that are asked for by name and not there.
        RequestError: the first stage is of another model than `checkpoint.initial`.
        DamagedError: `checkpoint.initial` cannot be read, or a dataset is damaged.
    """
    from flm_megatron.data.corpus.description import check_datasets
    from flm_megatron.data.tokenizer import open_tokenizer

    if run.data.chat is not None:
        raise RequestError("data.chat makes this a fine-tuning: run it with `flm sft`")
    run = _with_models(run)
    check_run_file(run)
    _require_data(run)
    tokenizer = open_tokenizer(str(run.tokenizer))
    check_datasets(run.data, tokenizer)
    _check_indices(run)
    run = resolve_vocabulary(run, tokenizer.vocab_size)
    check_run_file(run)
    require_installed(run)
    _require_beginning(run, start_anew)
    return run


def require_installed(run: RunConfig) -> None:
    """Check that whatever the run file asks for by name can run here.

    Raises:
        Mistakes: a kernel, FP8 or Transformer Engine cannot, a hook or tracker is not found, or what is to be evaluated
            is not.
    """
    from flm_megatron import kernels
    from flm_megatron.evaluation.while_training import check_evaluation
    from flm_megatron.kernels import fp8
    from flm_megatron.kernels.choice import require_transformer_engine
    from flm_megatron.training.hooks import load_hook
    from flm_megatron.training.telemetry import require_telemetry
    from flm_megatron.training.trackers.names import require_tracker

    checks: list[Callable[[], object]] = [partial(kernels.choose, run.kernels)]
    checks += [partial(load_hook, path) for path in run.hooks]
    checks.append(partial(require_telemetry, run))
    checks += [partial(require_tracker, tracker.name) for tracker in run.logging.trackers]
    for stage in run.stages:
        checks += [partial(fp8.require, stage), partial(require_transformer_engine, stage)]
    if run.evaluation.asked:
        checks.append(partial(check_evaluation, run))
    refuse_together(checks)


def require_places(run: RunConfig, only: str | None = None) -> None:
    """Check that `only` is a stage, and that the run can write its output.

    Raises:
        Mistakes: one of these does not hold.
    """
    checks: list[Callable[[], object]] = [partial(require_folder, run.output, "output")]
    if only is not None:
        checks.insert(0, partial(stage_index, run, only))
    if run.data.cache is not None:
        checks.append(partial(require_folder, run.data.cache, "data.cache"))
    refuse_together(checks)


def require_turn(run: RunConfig, only: str | None, start_anew: bool) -> None:
    """Check that a new run is not asked to start with a later stage. Raises RequestError if it is."""
    from flm_megatron.training.resume.start import has_checkpoints

    first = run.stages[0].name
    if only not in (None, first) and (start_anew or not has_checkpoints(run)):
        raise RequestError(f"stage {only!r} needs stage {first!r} to be finished: train it first")


def check_epochs(run: RunConfig) -> None:
    """Check that sources with `epochs` last for all budgets. Raises RequestError if they do not."""
    from flm_megatron.config.budget import stage_budgets
    from flm_megatron.data.corpus.description import read_description

    length, sources = run.data.sequence_length, run.data.train
    if any(source.epochs is None for source in sources):
        return
    wanted = stage_budgets(run)[-1].end_sample
    passes = {source.path: (read_description(source.path).tokens - 1) // length for source in sources}
    there = sum(max(1, round(passes[source.path] * source.epochs)) for source in sources if source.epochs)
    if wanted > there:
        raise RequestError(
            f"data.train ends after {there * length:,} tokens ({there:,} samples of {length}), but the stages ask for "
            f"{wanted * length:,} ({wanted:,} samples): shorten the budgets, raise epochs, or give weights"
        )


def _with_models(run: RunConfig) -> RunConfig:
    """The run with the models that it takes from a checkpoint, which alone needs torch."""
    if not any(stage.model.from_checkpoint for stage in run.stages):
        return run
    from flm_megatron.checkpoint.run_file import with_checkpoint_models

    return with_checkpoint_models(run)


def _require_beginning(run: RunConfig, start_anew: bool) -> None:
    """For a new run, check `checkpoint.initial` against the first stage, and budgets against the data."""
    from flm_megatron.training.resume.first_checkpoint import check_initial
    from flm_megatron.training.resume.start import has_checkpoints

    if start_anew or not has_checkpoints(run):
        check_epochs(run)
        check_initial(run)


def _check_indices(run: RunConfig) -> None:
    """Check every entry of the datasets' indices, which are large: of a launcher's processes the first does it."""
    from flm_megatron.data.corpus.verify import check_indices

    if os.environ.get("RANK", "0") == "0":
        check_indices([*run.data.train, *run.data.validation])


def _require_data(run: RunConfig) -> None:
    """Check that the run names a tokenizer and data, that the tokenizer exists, and that URLs can be opened here."""
    from flm_megatron.data.tokenizer import tokenizer_exists

    lines = []
    if run.tokenizer is None:
        lines.append("tokenizer is not set: give the tokenizer that the data was made with")
    elif not tokenizer_exists(run.tokenizer):
        lines.append(f"tokenizer {run.tokenizer} is not there: train one with `flm data tokenizer`")
    if not run.data.train:
        lines.append("data.train has no sources: name at least one dataset made by `flm data build`")
    sources = [source.path for source in (*run.data.train, *run.data.validation)]
    for url in {str(place) for place in (run.tokenizer, *sources) if place and is_url(place)}:
        try:
            filesystem(url)
        except RequestError as error:
            lines.append(str(error))
    if lines:
        raise Mistakes(lines)
