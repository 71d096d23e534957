"""Options of the commands that run a checkpoint's model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.checkpoint.options import add_vocab_size
from flm_megatron.cli.options.parser import path, positive
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from flm_megatron.config.schema import ParallelConfig


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Tokenizer, precision and layout."""
    parser.add_argument(
        "--tokenizer", type=path, help="tokenizer, a file or a folder; the checkpoint's own if not given"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="precision of the model; that of its training")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--pipeline", type=positive, default=1, help="pipeline-parallel size (default 1)")
    parser.add_argument("--data", type=positive, help="data-parallel size; what the launcher's processes leave, or 1")
    add_vocab_size(parser)


def layout_of(args: argparse.Namespace) -> ParallelConfig:
    """The layout that the options ask for."""
    from flm_megatron.config.schema import ParallelConfig

    return ParallelConfig(tensor=args.tensor, pipeline=args.pipeline, data=args.data)


def checkpoints_of(args: argparse.Namespace) -> list[Path]:
    """The checkpoints named, or the last one of each stage of the run in `--all-stages`.

    Raises:
        RequestError: both were given or neither, or the run has no checkpoint.
    """
    from flm_megatron.evaluation.stages import last_checkpoints

    if bool(args.checkpoints) == bool(args.all_stages):
        raise RequestError("give checkpoints or --all-stages RUN_DIR, one of the two")
    return last_checkpoints(args.all_stages) if args.all_stages else list(args.checkpoints)
