"""Options that several of `flm checkpoint`'s commands share."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import vocabulary


def add_vocab_size(parser: argparse.ArgumentParser) -> None:
    """Add `--vocab-size`, for formats that keep padding rows."""
    parser.add_argument(
        "--vocab-size", type=vocabulary, help="true vocabulary, where the checkpoint is padded and does not record it"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, the precision to write."""
    names = ["fp32", "bf16", "fp16"]
    parser.add_argument("--dtype", choices=names, help="dtype of the weights; the stored one if not given")
