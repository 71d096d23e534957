"""Opening a checkpoint."""

from __future__ import annotations

from flm_megatron.api.values import require_vocabulary
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint as opened
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import given_location


def open_checkpoint(path: FilePath, *, vocab_size: int | None = None) -> LogicalCheckpoint:
    """The checkpoint in a folder: ours (`torch_dist`), a Hugging Face model, or Megatron-LM's.

    Nothing but its description is read: `tensors` has names, shapes and dtypes, `read(name, region)` reads values.
    `vocab_size` is the true vocabulary, for the last two where they are padded and do not record it.

    >>> checkpoint = open_checkpoint("runs/tiny/checkpoints/small/step_00000008")
    >>> checkpoint.read("output_layer.weight").shape
    torch.Size([500, 32])

    Raises:
        RequestError: there is no checkpoint of a known kind.
        DamagedError: there is one, but it cannot be read.
    """
    require_vocabulary(vocab_size)
    return opened(given_location(path, "path"), vocab_size)


def given_checkpoint(checkpoint: FilePath | LogicalCheckpoint) -> LogicalCheckpoint:
    """What was given where a folder or an open checkpoint may be. Raises as `open_checkpoint`."""
    return checkpoint if isinstance(checkpoint, LogicalCheckpoint) else opened(given_location(checkpoint, "checkpoint"))
