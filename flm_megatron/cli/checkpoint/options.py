"""Options that several of `flm checkpoint`'s commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import vocabulary
from flm_megatron.paths import require_folder

if TYPE_CHECKING:
    import torch

    from flm_megatron.checkpoint.logical import LogicalCheckpoint
    from flm_megatron.config.schema import ModelConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_vocab_size(parser: argparse.ArgumentParser) -> None:
    """Add `--vocab-size`, for formats that keep padding rows."""
    parser.add_argument(
        "--vocab-size", type=vocabulary, help="true vocabulary, where the checkpoint is padded and does not record it"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, the precision to write."""
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; the stored one if not given")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that `--dtype` names."""
    import torch

    return getattr(torch, DTYPES[name]) if name else None


def open_with_model(path: Path, vocab_size: int | None) -> tuple[LogicalCheckpoint, ModelConfig]:
    """A checkpoint of any format without vocabulary padding, checked against the model that it says it is of.

    Raises RequestError if it does not say, or if its tensors do not fit; DamagedError if it cannot be read.
    """
    from flm_megatron.checkpoint.described import check_structure, required_model, without_padding
    from flm_megatron.checkpoint.files.manifest import MANIFEST, verify
    from flm_megatron.checkpoint.opening import open_checkpoint

    if (path / MANIFEST).exists():
        verify(path, quick=True)
    view = open_checkpoint(path, vocab_size)
    model = required_model(view, str(path), vocab_size)
    view = without_padding(view, model)
    check_structure(view.tensors, model, str(path))
    return view, model


def require_new(path: Path) -> None:
    """Check that a folder could be made at `path`, before anything is read; an existing one is refused later.

    Raises RequestError if it cannot.
    """
    if not os.path.lexists(path):
        require_folder(path, "destination")


def without_mask(source: LogicalCheckpoint, fold: bool) -> LogicalCheckpoint:
    """The source itself, or with a half-open growth mask folded in if `fold`.

    Raises RequestError for a mask that is not open, where folding was not asked for or cannot be done.
    """
    from flm_megatron.growth.boundary import saved_mask_value
    from flm_megatron.growth.grown.folding import folded

    return source if saved_mask_value(source.manifest) == 1 else folded(source, fold)
