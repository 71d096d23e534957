"""Handing a checkpoint to other programs as a Hugging Face folder, and taking one from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flm_megatron.api.reshard import CheckpointCopy
from flm_megatron.api.values import require_vocabulary, require_whole
from flm_megatron.checkpoint.described import required_model
from flm_megatron.checkpoint.files.destination import require_new
from flm_megatron.checkpoint.hugging_face.families.registry import family_named
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, folding_note, write_hugging_face
from flm_megatron.checkpoint.lazy.adapters import merged
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint, dtype_named
from flm_megatron.checkpoint.opening import open_with_model
from flm_megatron.checkpoint.own_tokenizer import tokenizer_to_export
from flm_megatron.checkpoint.stage_manifest import manifest_for
from flm_megatron.checkpoint.tools.reshard import reshard
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.growth.grown.folding import without_mask
from flm_megatron.paths import FilePath, given_path
from flm_megatron.storage.path import given_location


@dataclass(frozen=True)
class HuggingFaceExport:
    """A Hugging Face folder that was written."""

    path: Path
    nbytes: int
    """Of all weights."""
    folding: str | None
    """How multipliers were folded into the weights, and whether that is exact; none where they were not."""
    no_tokenizer: str
    """Why no tokenizer files were written; empty where they were."""


def export_hf(
    checkpoint: FilePath,
    out: FilePath,
    *,
    flavour: str = "teleflm",
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_size: int = 5 * 10**9,
    pad_vocab_to: int = 1,
    tokenizer: FilePath | None = None,
    fold_mask: bool = False,
    vocab_size: int | None = None,
) -> HuggingFaceExport:
    """Write the weights of a checkpoint of any format as a Hugging Face folder, adapters merged into them.

    Values stream through: memory does not grow with the model. Processes that torchrun or srun started share the work
    and all call.

    Args:
        checkpoint, out: folders to read and to write; the second must not exist.
        flavour: the family to write it as (docs/families.md). "teleflm" is the released form, with its code; the
            others have the multipliers folded into embedding and head, so that plain `transformers` gives the same
            logits.
        dtype: of the weights; the stored one without.
        shard_size: largest size of a file in bytes; a larger tensor has a file of its own.
        pad_vocab_to: pad the vocabulary to a multiple of this.
        tokenizer: SentencePiece model, `tokenizer.json` or tiktoken file; the checkpoint's own without.
        fold_mask: fold a half-open growth mask in, where that is exact.
        vocab_size: true vocabulary, where the checkpoint is padded and does not record it.

    Raises:
        RequestError: it cannot be exported as asked, or `out` cannot be written.
        DamagedError: the checkpoint cannot be read.
    """
    family = family_named(flavour)
    require_whole("shard_size", shard_size)
    require_whole("pad_vocab_to", pad_vocab_to)
    require_vocabulary(vocab_size)
    weights = dtype_named(dtype)
    path, out = given_location(checkpoint, "checkpoint"), given_path(out, "out")
    given = None if tokenizer is None else given_path(tokenizer, "tokenizer")
    require_new(out)
    with launched_processes() as processes:
        source, model = open_with_model(path, vocab_size)
        source, model = merged(without_mask(source, fold_mask), model)
        found, missing = tokenizer_to_export(given, model, path, source.manifest)
        length = source.manifest.run.sequence_length
        options = ExportOptions(flavour, weights, shard_size, pad_vocab_to, found, length)
        nbytes = write_hugging_face(source, model, out, options, processes)
    return HuggingFaceExport(out, nbytes, None if family.multipliers else folding_note(model, family), missing)


def import_hf(
    folder: FilePath,
    out: FilePath,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    vocab_size: int | None = None,
) -> CheckpointCopy:
    """Write a Hugging Face folder of a known family as a checkpoint of ours.

    Training can also start from the folder as it is: see `checkpoint.initial` of the run file. Processes that torchrun
    or srun started share the work and all call.

    Args:
        folder: safetensors, or `.bin` files, of which no code is run.
        out: folder to write; it must not exist.
        dtype: of the weights; the stored one without.
        vocab_size: true vocabulary, where the folder's is padded.

    Raises:
        RequestError: the folder is of no known family, or `out` cannot be written.
        DamagedError: a file of it cannot be read.
    """
    require_vocabulary(vocab_size)
    weights = dtype_named(dtype)
    path, out = given_location(folder, "folder"), given_location(out, "out")
    require_new(out)
    with launched_processes() as processes:
        source = HuggingFaceCheckpoint(path, vocab_size)
        model = required_model(source, str(path), vocab_size)
        checkpoint = ConvertedCheckpoint(source, weights)
        written = reshard(checkpoint, out, processes, manifest_for(checkpoint, model, path))
    return CheckpointCopy(out, written.logical_hash)
