"""Check a checkpoint: sizes and checksums of its files, shapes of its tensors. Exit status 1 if anything is wrong."""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_vocab_size
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint verify`."""
    parser.add_argument("path", type=location, help="checkpoint")
    parser.add_argument("--quick", action="store_true", help="sizes and structure only, without reading values")
    add_json(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is wrong; returns 1 if something is."""
    import sys

    from flm_megatron.api.verify import verify
    from flm_megatron.distributed.launched import is_first_process

    result = verify(args.path, quick=args.quick, vocab_size=args.vocab_size)
    if is_first_process() and args.json:
        print_json({"path": args.path, "looked_at": result.looked_at, "problems": result.problems})
    elif is_first_process():
        for problem in result.problems:
            print(f"flm checkpoint verify: {problem}", file=sys.stderr)
        if not result.problems:
            print(f"{args.path}: nothing wrong ({result.looked_at})")
    return 1 if result.problems else 0
