"""Fine-tune a checkpoint on conversations, going on where the run stands."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm sft`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument(
        "run_file", type=path, help="run file (YAML) whose data.chat says how conversations are written"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved run file and stop")
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Fine-tune what is left to do."""
    from flm_megatron.api.train import STOPPED_EARLY, fine_tune
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.loader import dump_run
    from flm_megatron.distributed.signals import stop_before_training

    with stop_before_training(STOPPED_EARLY):
        config = open_run(args.run_file, args.overrides)
        if args.print_config:
            from flm_megatron.launch.fine_tuning import prepared

            print(dump_run(prepared(config)[0]), end="")
            return 0
        return fine_tune(config)
