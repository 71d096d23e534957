"""Show what a checkpoint of any format holds: its place in a run, its model, its tensors."""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_vocab_size
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint inspect`."""
    parser.add_argument("path", type=location, help="checkpoint: ours, Megatron-LM's or a Hugging Face folder")
    parser.add_argument("--statistics", action="store_true", help="also norm, mean, std and largest value (reads all)")
    add_json(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Print the description; returns 0."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.tools.inspect import add_statistics, describe
    from flm_megatron.distributed.launched import launched_processes
    from flm_megatron.distributed.progress import progress_bar

    with launched_processes() as processes:
        checkpoint = open_checkpoint(args.path, args.vocab_size)
        report = describe(checkpoint, args.vocab_size)
        if args.statistics:
            with progress_bar("read", report.bytes, processes) as moved:
                add_statistics(report, checkpoint, processes, moved)
        if processes.rank == 0:
            print_json({"path": args.path, **report.to_json()}) if args.json else print(report.as_text())
    return 0
