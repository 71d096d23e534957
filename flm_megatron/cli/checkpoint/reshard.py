"""Copy a checkpoint to another file layout, dtype or format, in bounded memory.

Without --tensor and --pipeline the copy is merged: its tensors are spread evenly over one file for each process that
writes. With them, rank r of that layout finds what it will load in files of its own, so that a large job starts fast;
with --format classic these are Megatron-LM's mp_rank folders (weights only). Any layout can load any of them.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_dtype, add_vocab_size
from flm_megatron.cli.options.parser import location, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint reshard`."""
    parser.add_argument("source", type=location, help="checkpoint of any format")
    parser.add_argument("destination", type=location, help="new folder")
    parser.add_argument("--format", choices=["torch_dist", "classic"], default="torch_dist", help="format to write")
    parser.add_argument("--tensor", type=positive, help="tensor-parallel size of the target layout")
    parser.add_argument("--pipeline", type=positive, help="pipeline-parallel size of the target layout")
    parser.add_argument("--virtual-pipeline", type=positive, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--no-optimizer", action="store_true", help="weights only")
    add_dtype(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Copy, and print the logical hash before and after; returns 0."""
    from flm_megatron.api.reshard import reshard
    from flm_megatron.distributed.launched import is_first_process

    written = reshard(
        args.source,
        args.destination,
        format=args.format,
        tensor=args.tensor,
        pipeline=args.pipeline,
        virtual_pipeline=args.virtual_pipeline,
        optimizer=not args.no_optimizer,
        dtype=args.dtype,
        vocab_size=args.vocab_size,
    )
    if is_first_process():
        print(f"logical hash before {written.logical_hash}\nlogical hash after  {written.logical_hash}")
    return 0
