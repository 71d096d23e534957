"""Train a run file's stages in order, going on where the run stands."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path, take_overrides

BRANCH = "from the checkpoint kept at TOKENS (1.5M, 3e6), cool down a copy of the run in OUTPUT/branches"
ANEW = "begin from nothing, or the branch from its checkpoint; earlier results are kept as NAME.before-N"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm train`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--stage", help="train only this stage")
    part.add_argument("--branch", metavar="decay@TOKENS", help=BRANCH)
    parser.add_argument("--start-anew", action="store_true", help=ANEW)
    parser.add_argument(
        "--print-config", action="store_true", help="check the run file by its rules, print it resolved and stop"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="on a terminal show the run as `flm status --watch` does; elsewhere the plain lines are printed",
    )
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Train what is left to do."""
    from flm_megatron.api.train import STOPPED_EARLY, train
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.loader import dump_run
    from flm_megatron.distributed.signals import stop_before_training
    from flm_megatron.growth.foreseen import check_run_file

    with stop_before_training(STOPPED_EARLY):
        config = open_run(args.run_file, args.overrides)
        if args.print_config:
            if args.branch is not None:
                from flm_megatron.launch.branch import decay_branch

                config = decay_branch(config, args.branch, args.start_anew)
            check_run_file(config)
            print(dump_run(config), end="")
            return 0
        if args.watch and (status := _watched(args, config.output)) is not None:
            return status
        return train(config, stage=args.stage, start_anew=args.start_anew, branch=args.branch)


def _watched(args: argparse.Namespace, output: str) -> int | None:
    """The exit status of a run that was watched; none if there is no terminal to watch it on."""
    from pathlib import Path

    from flm_megatron.launch.watched import require_watch, train_watched

    require_watch(args.branch)
    stage = ["--stage", args.stage] if args.stage is not None else []
    anew = ["--start-anew"] if args.start_anew else []
    return train_watched([str(args.run_file), *stage, *anew, *args.overrides], Path(output))
