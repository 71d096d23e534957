"""Fine-tune a checkpoint on conversations, going on where the run stands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import path

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm sft`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument(
        "run_file", type=path, help="run file (YAML) whose data.chat says how conversations are written"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved run file and stop")
    parser.epilog = "Any field of the run file can be overridden: --stages.0.parallel.tensor 2 (see `flm config`)."
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train what is left to do."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.loader import dump_run
    from flm_megatron.distributed.signals import stop_before_training

    with stop_before_training("stopped by a signal before training began"):
        config = open_run(args.run_file, args.overrides)
        if args.print_config:
            print(dump_run(prepared(config)[0]), end="")
            return 0
        return _train(config)


def _train(config: RunConfig) -> int:
    """Check everything, then start."""
    from flm_megatron.distributed.world import launched
    from flm_megatron.launch.preflight import require_places
    from flm_megatron.launch.run import check_local, train

    require_places(config)
    config, lines = prepared(config)
    if not launched():
        check_local(config)
    if not launched():
        print("\n".join(lines), flush=True)
    return train(config)


def prepared(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with the model and the tokenizer of its checkpoint and the tokens of its epochs, and lines that say so.

    Raises:
        RequestError: no checkpoint, a tokenizer that is not the checkpoint's, or anything `fine_tuning_run` refuses.
    """
    from flm_megatron.errors import RequestError
    from flm_megatron.evaluation.subject import open_subject
    from flm_megatron.training.fine_tuning.run import fine_tuning_run
    from flm_megatron.training.resume.first_view import check_no_mask

    if config.checkpoint.initial is None:
        raise RequestError("checkpoint.initial is not set: name the checkpoint to fine-tune")
    subject = open_subject(config.checkpoint.initial, config.tokenizer)
    check_no_mask(subject.view.manifest, config.checkpoint.initial)
    return fine_tuning_run(config, subject.model, subject.tokenizer.path)
