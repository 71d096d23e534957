"""Any logical checkpoint written as a Hugging Face folder, streaming, by any number of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.destination import destination, write_errors
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.hugging_face.config import config_of
from flm_megatron.checkpoint.hugging_face.families.family import Family
from flm_megatron.checkpoint.hugging_face.families.registry import family_named, require_expressible
from flm_megatron.checkpoint.hugging_face.names import TargetTensor, target_tensors
from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in, lay_out
from flm_megatron.checkpoint.hugging_face.tokenizer import SpecialIds, write_tokenizer
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint, is_power_of_two
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import UNRECORDED_LENGTH
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import EMBEDDING, PROJECTION, QKV, parameter_specs
from flm_megatron.paths import FilePath

TRANSPOSED = 4
"""A column of a file is written in runs of as many values as there are rows in memory: the more, the faster."""
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    `flavour` is the name of a family; `dtype` none keeps the stored one; `shard_bytes` is the largest size of a shard
    file (a larger tensor gets its own); the vocabulary is padded to a multiple of `pad_vocab_to`; `tokenizer` is the
    path of one.
    """

    flavour: str = "teleflm"
    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    pad_vocab_to: int = 1
    tokenizer: FilePath | None = None
    sequence_length: int = UNRECORDED_LENGTH


def folding(model: ModelConfig, family: Family) -> dict[str, float]:
    """Factors on the weights that make a model of `family` compute what `model` does with its multipliers.

    So they do where norms of queries and keys have another epsilon than the other norms: queries and keys take the root
    of the epsilons' ratio, values with them, and the projection gives it back.
    """
    if family.multipliers:
        return {}
    input_mult = model.input_mult / family.embedding_multiplier(model)
    multipliers = {"embedding": input_mult, "head": model.logit_multiplier}
    specs = parameter_specs(model).values()
    factors = {spec.name: multipliers[spec.kind] for spec in specs if spec.kind in multipliers}
    if model.query_key_norm and model.query_key_epsilon != model.norm_epsilon:
        factor = math.sqrt(model.norm_epsilon / model.query_key_epsilon)
        factors |= {spec.name: factor for spec in specs if spec.module == QKV}
        factors[f"{PROJECTION}.weight"] = 1 / factor
    if model.tie_embeddings:  # the norm that the head reads makes up for the factor of the embedding
        norms = (spec.name for spec in specs if spec.place == "last")
        factors |= dict.fromkeys(norms, model.logit_multiplier / input_mult)
    return factors


def folding_note(model: ModelConfig, family: Family) -> str:
    """One line on how the multipliers were folded, and whether the logits are bit-identical."""
    factors = folding(model, family)
    parts = [f"{name} x {factor:g}" for name, factor in factors.items()]
    exact = all(map(is_power_of_two, factors.values()))
    how = "bit-exact: powers of two" if exact else "rounded: not powers of two, logits agree to rounding"
    return f"multipliers folded into the weights ({', '.join(parts)}); {how}"


def write_hugging_face(
    source: LogicalCheckpoint,
    model: ModelConfig,
    path: Path,
    options: ExportOptions,
    processes: Processes | None = None,
) -> int:
    """Write the weights of `source`, whose model is `model`, to the new folder `path`; returns the bytes of weights.

    At most BUFFER_BYTES are in memory at a time, TRANSPOSED times as many of a matrix that is stored transposed. The
    folder appears under its name only when whole.
    Raises RequestError if it exists, if the disk is too small or if the family is not known or cannot express `model`.
    """
    processes = processes or Processes()
    family = family_named(options.flavour)
    require_expressible(model, family)
    norms = [spec.name for spec in parameter_specs(model).values() if spec.kind == "norm"]
    offsets = dict.fromkeys(norms, -family.norm_offset) if family.norm_offset else None
    factors = folding(model, family)
    checkpoint = ConvertedCheckpoint(source, options.dtype, factors, optimizer=False, offsets=offsets)
    targets = target_tensors(model, family)
    padded = -(-int(model.vocab_size or 0) // options.pad_vocab_to) * options.pad_vocab_to
    infos = {name: _info(name, target, checkpoint, padded) for name, target in targets.items()}
    shards = shard_names(infos, options.shard_bytes)
    total = sum(_nbytes(info) for info in infos.values())
    with destination(path, processes, total) as folder:
        processes.on_first(write_errors(path)(lambda: _lay_out_all(folder, infos, shards)))
        processes.together(write_errors(path)(lambda: _copy(checkpoint, targets, folder, shards, processes, total)))
        processes.on_first(
            write_errors(path)(lambda: _describe(folder, model, checkpoint, shards, total, padded, options))
        )
    return total


def shard_names(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, str]:
    """The shard file of every tensor, in order: a new file whenever the next tensor would exceed `shard_bytes`."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + _nbytes(info) > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _nbytes(info)
    if len(groups) == 1:
        return dict.fromkeys(groups[0], "model.safetensors")
    count = len(groups)
    return {
        name: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }


def _info(name: str, target: TargetTensor, checkpoint: LogicalCheckpoint, padded: int) -> TensorInfo:
    if target.source not in checkpoint.tensors:
        raise RequestError(f"the checkpoint has no tensor {target.source}, which {name} is made of")
    shape = (padded, *target.shape[1:]) if target.padded else target.shape
    return TensorInfo(shape, checkpoint.tensors[target.source].dtype)


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _lay_out_all(folder: Path, infos: Mapping[str, TensorInfo], shards: Mapping[str, str]) -> None:
    for shard in dict.fromkeys(shards.values()):
        lay_out(folder / shard, {name: info for name, info in infos.items() if shards[name] == shard})


def _copy(
    checkpoint: LogicalCheckpoint,
    targets: Mapping[str, TargetTensor],
    folder: Path,
    shards: Mapping[str, str],
    processes: Processes,
    total: int,
) -> None:
    """Copy this process's shard of the chunks into the laid-out files. Padding rows stay the zeros they are."""
    chunks = [(name, *rows) for name, target in targets.items() for rows in _row_chunks(target, checkpoint)]
    arrays: dict[str, StoredArray] = {}
    for shard in dict.fromkeys(shards.values()):
        arrays |= arrays_in(folder / shard)
    descriptors = {shard: os.open(folder / shard, os.O_WRONLY) for shard in dict.fromkeys(shards.values())}
    try:
        with progress_bar("export", total, processes) as moved:
            for name, first, rows in chunks[processes.rank :: processes.size]:
                moved(_copy_rows(checkpoint, targets[name], first, rows, arrays[name], descriptors[shards[name]]))
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _row_chunks(target: TargetTensor, checkpoint: LogicalCheckpoint) -> Iterator[tuple[int, int]]:
    count, *trailing = target.logical_shape
    width = max(1, math.prod(trailing) * checkpoint.tensors[target.source].dtype.itemsize)
    rows = max(1, BUFFER_BYTES * (TRANSPOSED if target.transposed else 1) // width)
    for first in range(0, count, rows):
        yield first, min(rows, count - first)


def _copy_rows(
    checkpoint: LogicalCheckpoint, target: TargetTensor, first: int, rows: int, array: StoredArray, descriptor: int
) -> int:
    for start, region in target.sources(first, rows):
        sizes = region.sizes if target.layer is None else region.sizes[1:]
        values = checkpoint.read(target.source, region).view(sizes)
        if target.transposed:
            _write_columns(values.t().clone(memory_format=torch.contiguous_format), start, array, descriptor)
        else:
            array.write(descriptor, values.contiguous(), Region((start, *(0 for _ in sizes[1:])), sizes))
    return rows * math.prod(target.logical_shape[1:]) * array.dtype.itemsize


def _write_columns(values: torch.Tensor, start: int, array: StoredArray, descriptor: int) -> None:
    """Write `values` [rows, some columns] from column `start` on, a run of bytes for every row."""
    for row in range(len(values)):
        array.write(descriptor, values[row : row + 1], Region((row, start), (1, values.size(1))))


def _describe(
    folder: Path,
    model: ModelConfig,
    checkpoint: LogicalCheckpoint,
    shards: Mapping[str, str],
    total: int,
    padded: int,
    options: ExportOptions,
) -> None:
    """Write all files but the weights: index, configuration, modelling code, tokenizer, generation settings."""
    if len(set(shards.values())) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shards})
    dtype = DTYPE_NAMES.get(checkpoint.tensors[EMBEDDING].dtype, "float32")
    family = family_named(options.flavour)
    config = config_of(model, family, padded, options.sequence_length, dtype)
    special = SpecialIds()
    if options.tokenizer:
        special = write_tokenizer(folder, open_tokenizer(options.tokenizer), options.sequence_length)
    _write_json(folder / "config.json", config | special.settings())
    generation: dict[str, object] = {"do_sample": False, **special.settings()}
    if padded > int(model.vocab_size or 0):
        generation["suppress_tokens"] = list(range(int(model.vocab_size or 0), padded))
    _write_json(folder / "generation_config.json", generation)
    for name in family.code:
        shutil.copyfile(Path(__file__).parent / "released_form" / name, folder / name)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
