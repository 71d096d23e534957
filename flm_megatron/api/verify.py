"""Checking a checkpoint against what was recorded when it was written."""

from __future__ import annotations

from flm_megatron.api.values import require_vocabulary
from flm_megatron.checkpoint.tools.verify import Verification, verify_checkpoint
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import given_location


def verify(checkpoint: FilePath, *, quick: bool = False, vocab_size: int | None = None) -> Verification:
    """Check sizes and checksums of a checkpoint's files and the shapes of its tensors; no `problems` if all is well.

    With `quick` values are not read: sizes and structure only. Processes that torchrun or srun started share the work
    and all call. Formats without checksums are read through instead. `vocab_size` is the true vocabulary, where the
    checkpoint is padded and does not record it.

    Raises:
        RequestError: there is no checkpoint, or its tensors are not those of the model that it says it is of.
        DamagedError: it cannot be opened at all.
    """
    require_vocabulary(vocab_size)
    path = given_location(checkpoint, "checkpoint")
    with launched_processes() as processes:
        files = path.rglob("*") if path.is_dir() else ()
        nbytes = sum(file.stat().st_size for file in files if file.is_file())
        with progress_bar("verify", 0 if quick else nbytes, processes) as moved:
            return verify_checkpoint(path, quick, processes, moved, vocab_size)
