"""Telling what kind of checkpoint a folder holds."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.torch_dist import METADATA, TorchDistCheckpoint
from flm_megatron.errors import RequestError


def open_checkpoint(path: str | Path) -> LogicalCheckpoint:
    """The checkpoint in a folder: `torch_dist`, or a Hugging Face model.

    Raises:
        RequestError: there is no checkpoint of a known kind.
        DamagedError: there is one, but it cannot be read.
    """
    path = Path(path)
    if (path / METADATA).exists() or (path / "metadata.json").exists():
        return TorchDistCheckpoint(path)
    if (path / "config.json").exists():
        from flm_megatron.checkpoint.hugging_face import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if not path.is_dir():
        raise RequestError(f"{path} is not a checkpoint: there is no such folder")
    raise RequestError(f"{path} is not a checkpoint: it holds neither .metadata (torch_dist) nor config.json")
