"""Opens checkpoints of any format."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.described import check_structure, required_model, without_padding
from flm_megatron.checkpoint.files.manifest import MANIFEST, verify
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.torch_dist.reader import METADATA, TorchDistCheckpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.storage.path import location


def open_checkpoint(path: str | Path, vocab_size: int | None = None) -> LogicalCheckpoint:
    """Open the checkpoint in a folder: `torch_dist`, a Hugging Face model, or Megatron-LM's legacy layout.

    `vocab_size` is the true vocabulary, for padded checkpoints of the last two that do not record it.

    Raises:
        RequestError: there is no checkpoint of a known kind.
        DamagedError: there is one, but it cannot be read.
    """
    path = location(path)
    if (path / METADATA).exists() or (path / "metadata.json").exists():
        return TorchDistCheckpoint(path)
    if (path / "config.json").exists():
        from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path, vocab_size)
    if not path.is_dir():
        raise RequestError(f"{path} is not a checkpoint: there is no such folder")
    if (path / "latest_checkpointed_iteration.txt").exists() or next(path.glob("mp_rank_*"), None):
        from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint, latest_folder

        folder = latest_folder(path)
        if (folder / METADATA).exists():
            return TorchDistCheckpoint(folder)
        return MegatronLegacyCheckpoint(folder, vocab_size)
    raise RequestError(
        f"{path} is not a checkpoint: it holds neither .metadata (torch_dist) nor config.json nor mp_rank folders"
    )


def open_with_model(path: Path, vocab_size: int | None = None) -> tuple[LogicalCheckpoint, ModelConfig]:
    """Open a checkpoint of any format without vocabulary padding, checked against the model that it records.

    Raises:
        RequestError: it does not say, or its tensors do not fit.
        DamagedError: it cannot be read, or a file does not have its recorded size.
    """
    if (path / MANIFEST).exists():
        verify(path, quick=True)
    checkpoint = open_checkpoint(path, vocab_size)
    model = required_model(checkpoint, str(path), vocab_size)
    checkpoint = without_padding(checkpoint, model)
    check_structure(checkpoint.tensors, model, str(path))
    return checkpoint, model
