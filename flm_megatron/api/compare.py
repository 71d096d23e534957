"""Comparing two checkpoints, value by value."""

from __future__ import annotations

from flm_megatron.api.values import require_vocabulary
from flm_megatron.checkpoint.opening import open_with_model
from flm_megatron.checkpoint.tools.compare import Comparison
from flm_megatron.checkpoint.tools.compare import compare as compared
from flm_megatron.checkpoint.tools.reshard import stored_bytes
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import given_location


def compare(first: FilePath, second: FilePath, *, vocab_size: int | None = None) -> Comparison:
    """Compare two checkpoints of any two formats, tensor by tensor; optimizer state where both have it.

    `differences` of the result has the largest difference of each common tensor, `beyond(tolerance)` names those that
    differ by more. Processes that torchrun or srun started share the work and all call. `vocab_size` is the true
    vocabulary, where a checkpoint is padded and does not record it.

    Raises:
        RequestError: one of them is no checkpoint, or does not say what model it is of.
        DamagedError: one of them cannot be read.
    """
    require_vocabulary(vocab_size)
    paths = given_location(first, "first"), given_location(second, "second")
    with launched_processes() as processes:
        (one, _), (other, _) = (open_with_model(path, vocab_size) for path in paths)
        with progress_bar("compare", stored_bytes(one.tensors), processes) as moved:
            return compared(one, other, processes, moved)
