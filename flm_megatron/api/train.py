"""Training a run, on text or on conversations."""

from __future__ import annotations

import threading

from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.signals import stop_before_training
from flm_megatron.errors import RequestError
from flm_megatron.launch.mirror.mirrored import mirrored
from flm_megatron.launch.preflight import require_places, require_turn, resolve

STOPPED_EARLY = "stopped by a signal before training began"


def train(run: RunConfig, *, stage: str | None = None, start_anew: bool = False, branch: str | None = None) -> int:
    """Train what is left of a run: all stages, growing between them, or one `stage` alone, or a `branch`.

    Without a launcher processes of this machine are started for every stage, as many as its layout needs; under
    torchrun, and what `flm launch` writes, this process is a rank, and all ranks call. Goes on where the run stands;
    with `start_anew` it begins from nothing, and earlier results are kept as NAME.before-N. The branch `decay@TOKENS`
    is a copy of the run from its checkpoint at TOKENS on, cooled down in an output folder of its own; with `start_anew`
    it begins there again, and the run stays as it is. Everything is checked before any process starts. For the main
    thread, because it listens to signals.

    Returns:
        0 when the run is trained to the end of its budget, 3 when SIGTERM or SIGINT stopped it after saving.

    Raises:
        RequestError: the run cannot be trained as asked (`Mistakes` lists all that is wrong).
        DamagedError: stored data is damaged, and no older checkpoint can stand in for it.
        FlmError: a process failed; the message names its rank and its error.
        SystemExit: with status 3, a signal came before the first step.
    """
    _require_main_thread()
    if branch is not None and stage is not None:
        raise RequestError(f"a branch has a stage of its own: give --branch or --stage {stage}, not both")
    with stop_before_training(STOPPED_EARLY):
        require_places(run, stage)
        with mirrored(run):
            run = resolve(run, start_anew and branch is None)
            if branch is not None:
                run, stage = _branch(run, branch, start_anew)
            from flm_megatron.distributed.world import launched  # torch takes seconds: mistakes are found before
            from flm_megatron.launch.run import check_local
            from flm_megatron.launch.run import train as train_checked

            if not launched():
                check_local(run)
            if branch is None:
                require_turn(run, stage, start_anew)
            return train_checked(run, stage, start_anew)


def fine_tune(run: RunConfig) -> int:
    """Fine-tune the checkpoint that `checkpoint.initial` names on the run's conversations.

    Models and tokenizer come from the checkpoint, budgets from the epochs of `data.chat`. It goes on where the run
    stands; processes, signals and what it returns are as with `train`.

    Raises:
        RequestError: the run cannot be trained as asked.
        DamagedError: stored data is damaged.
        FlmError: a process failed.
        SystemExit: with status 3, a signal came before the first step.
    """
    _require_main_thread()
    with stop_before_training(STOPPED_EARLY):
        require_places(run)
        with mirrored(run):
            from flm_megatron.distributed.world import launched
            from flm_megatron.launch.fine_tuning import prepared
            from flm_megatron.launch.run import check_local
            from flm_megatron.launch.run import train as train_checked

            run, lines = prepared(run)
            if not launched():
                check_local(run)
                print("\n".join(lines), flush=True)
            return train_checked(run)


def _branch(run: RunConfig, branch: str, anew: bool) -> tuple[RunConfig, str]:
    """The run of a branch, checked, and its last stage, which alone is left to train. Raises as `decay_branch`."""
    from flm_megatron.growth.foreseen import check_run_file
    from flm_megatron.launch.branch import decay_branch
    from flm_megatron.launch.preflight import check_epochs

    run = decay_branch(run, branch, anew)
    check_run_file(run)
    check_epochs(run)
    require_places(run)
    return run, run.stages[-1].name


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RequestError("training listens to signals, which reach the main thread alone: call it there")
