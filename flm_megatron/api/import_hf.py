"""Making a checkpoint of ours out of a Hugging Face folder."""

from __future__ import annotations

import os
from typing import Literal

from flm_megatron.api.reshard import CheckpointCopy
from flm_megatron.api.values import require_vocabulary
from flm_megatron.checkpoint.described import required_model
from flm_megatron.checkpoint.files.destination import require_new
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint, dtype_named
from flm_megatron.checkpoint.stage_manifest import manifest_for
from flm_megatron.checkpoint.tools.reshard import reshard
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.paths import given_path


def import_hf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    vocab_size: int | None = None,
) -> CheckpointCopy:
    """Write a Hugging Face folder of Llama's or Tele-FLM's form as a checkpoint of ours.

    Training can also start from the folder as it is: see `checkpoint.initial` of the run file. Processes that torchrun
    or srun started share the work and all call.

    Args:
        folder: safetensors, or `.bin` files, of which no code is run.
        out: folder to write; it must not exist.
        dtype: of the weights; the stored one without.
        vocab_size: true vocabulary, where the folder's is padded.

    Raises:
        RequestError: the folder is of no known form, or `out` cannot be written.
        DamagedError: a file of it cannot be read.
    """
    require_vocabulary(vocab_size)
    weights = dtype_named(dtype)
    path, out = given_path(folder, "folder"), given_path(out, "out")
    require_new(out)
    with launched_processes() as processes:
        source = HuggingFaceCheckpoint(path, vocab_size)
        model = required_model(source, str(path), vocab_size)
        view = ConvertedCheckpoint(source, weights)
        written = reshard(view, out, processes, manifest_for(view, model, path))
    return CheckpointCopy(out, written["logical_hash"])
