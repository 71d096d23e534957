"""Make a checkpoint of a Hugging Face folder of a known family, such as Llama or Tele-FLM.

Training can also start from the folder as it is: give it as `checkpoint.initial` in the run file.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_dtype, add_vocab_size
from flm_megatron.cli.options.parser import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint import-hf`."""
    parser.add_argument("source", type=location, help="Hugging Face folder: safetensors, or .bin (never run)")
    parser.add_argument("destination", type=location, help="new folder")
    add_dtype(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Import, and print the logical hash of what was written; returns 0."""
    from flm_megatron.api.hugging_face import import_hf
    from flm_megatron.distributed.launched import is_first_process

    written = import_hf(args.source, args.destination, dtype=args.dtype, vocab_size=args.vocab_size)
    if is_first_process():
        print(f"{args.destination}: logical hash {written.logical_hash}")
    return 0
