"""Weights of Megatron-LM's legacy checkpoints: one `mp_rank_XX[_YYY]/model_optim_rng.pt` per model-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.files.torch_file import read_torch_file
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.megatron_legacy.arguments import model_from_arguments
from flm_megatron.checkpoint.sharding.layout import chunk_regions
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.model.parameters import EMBEDDING, parameter_specs
from flm_megatron.model.parameters.axis import padded_vocab_size
from flm_megatron.model.parameters.names import LAYERS, module_names

LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
LAYER = re.compile(rf"{re.escape(LAYERS)}(\d{{1,6}})\.")
CHUNK = re.compile(r"model\d{0,4}")
NOT_WEIGHTS = ("_extra_state", "inv_freq")
"""Suffixes of entries of a rank's file that are not weights."""


@dataclass(frozen=True)
class LocalRegion:
    """A region of the logical tensor `source` and the first row of a rank's own tensor at which its rows lie."""

    source: str
    region: Region
    row: int


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of one rank: its shape and the regions that its rows hold. Other rows are vocabulary padding.

    `names` are those that Megatron-LM may use: norms that are modules of their own are named differently.
    """

    shape: tuple[int, ...]
    regions: tuple[LocalRegion, ...]
    names: tuple[str, ...]


def local_tensors(
    model: ModelConfig, parallel: ParallelConfig, tensor_rank: int, chunk: int, padded_vocab: int | None = None
) -> dict[str, LocalTensor]:
    """The tensors of one tensor rank in one model chunk by Megatron-LM's names, layers counted within the chunk."""
    padded = padded_vocab or padded_vocab_size(int(model.vocab_size or 0), parallel.tensor)
    specs, result = parameter_specs(model), {}
    for name, regions in chunk_regions(model, parallel, tensor_rank, chunk, padded).items():
        spec = specs[name]
        if not spec.stacked:
            rows = padded // parallel.tensor if spec.padded else spec.shape[0]
            whole = (LocalRegion(name, regions[0], 0),)
            result[name] = LocalTensor((rows, *regions[0].sizes[1:]), whole, module_names(spec))
            continue
        for layer in range(regions[0].sizes[0]):
            local, row = [], 0
            for region in regions:
                one = Region((region.offsets[0] + layer, *region.offsets[1:]), (1, *region.sizes[1:]))
                local.append(LocalRegion(name, one, row))
                row += region.sizes[1]
            names = module_names(spec, layer)
            result[names[0]] = LocalTensor((row, *regions[0].sizes[2:]), tuple(local), names)
    return result


@dataclass(frozen=True)
class RankFile:
    """What a rank's file holds: the tables of its model chunks by key, and arguments and iteration of the run."""

    chunks: dict[str, dict[str, object]]
    arguments: object
    iteration: object


class MegatronLegacyCheckpoint(LogicalCheckpoint):
    """Weights of a legacy Megatron-LM checkpoint of its core models, with its arguments as `config`.

    `path` is the folder of a run (whose latest iteration is read), of an iteration, or that of the `mp_rank` folders.
    `vocab_size` is the true vocabulary if the checkpoint does not record it. Optimizer state is not read.

    Raises:
        RequestError: not such a checkpoint, another architecture, or tensors that do not fit the arguments.
        DamagedError: a rank's file is missing or damaged, or names code.
    """

    def __init__(self, path: Path | str, vocab_size: int | None = None) -> None:
        self.path = latest_folder(Path(path))
        files, (tensor, pipeline) = _rank_files(self.path)
        saved = {rank: _saved(file) for rank, file in files.items()}
        first = saved[0, 0]
        self.config = model_from_arguments(first.arguments, str(self.path), vocab_size)
        chunks = _chunk_names(first.chunks, files[0, 0])
        ordered = [(chunk, rank) for chunk in chunks for rank in range(pipeline)]
        split = [_layer_count(saved[0, rank].chunks.get(chunk, {})) for chunk, rank in ordered]
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=len(chunks), pipeline_layers=split)
        self.manifest = Manifest(position=_progress(first))
        self._stored: dict[str, list[tuple[LocalRegion, StoredArray]]] = {}
        padded = tensor * _embedding_rows(first.chunks[chunks[0]], self.path)
        if int(self.config.vocab_size or 0) > padded:
            raise RequestError(f"{self.path}: vocabulary {self.config.vocab_size} asked for, {padded} rows stored")
        for number, (chunk, pipeline_rank) in enumerate(ordered):
            for tensor_rank in range(tensor):
                tensors = saved[tensor_rank, pipeline_rank].chunks.get(chunk, {})
                self._place(local_tensors(self.config, parallel, tensor_rank, number, padded), tensors)
        self._specs = parameter_specs(self.config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(spec.shape, self._stored[name][0][1].dtype) for name, spec in self._specs.items()
        }

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        if name not in self.tensors:
            raise RequestError(f"{self.path}: no tensor {name}; of a legacy checkpoint only the weights are read")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        out = torch.empty(region.sizes, dtype=info.dtype)
        stacked = self._specs[name].stacked
        for local, array in self._stored[name]:
            common = local.region.intersect(region)
            if common is None:
                continue
            inside = common.within(local.region)
            offsets, sizes = inside.offsets[stacked:], inside.sizes[stacked:]
            values = array.read(Region((offsets[0] + local.row, *offsets[1:]), sizes))
            out[common.within(region).slices] = values.view(common.sizes)
        return out

    def _place(self, wanted: dict[str, LocalTensor], tensors: Mapping[str, object]) -> None:
        for name, local in wanted.items():
            array = next((tensors[key] for key in local.names if key in tensors), None)
            if not isinstance(array, StoredArray):
                raise DamagedError(f"{self.path}: tensor {name} is missing from a rank's file")
            if array.shape != local.shape:
                raise RequestError(f"{self.path}: {name} has shape {array.shape}, the arguments ask for {local.shape}")
            for local_region in local.regions:
                self._stored.setdefault(local_region.source, []).append((local_region, array))
        known = {key for local in wanted.values() for key in local.names}
        for key, value in tensors.items():
            if isinstance(value, StoredArray) and key not in known and not key.endswith(NOT_WEIGHTS):
                raise RequestError(f"{self.path}: tensor {key} is not one of the model that the arguments describe")


def latest_folder(path: Path) -> Path:
    """The folder of the latest iteration of a Megatron-LM run; `path` itself if it is not the folder of a run."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    step = latest.read_text(encoding="ascii", errors="replace").strip()
    return path / (f"iter_{int(step):07d}" if re.fullmatch("[0-9]{1,18}", step) else "release")


def _rank_files(path: Path) -> tuple[dict[tuple[int, int], Path], tuple[int, int]]:
    """The file of every (tensor, pipeline) rank, and the sizes. Raises DamagedError if one is missing."""
    files = {}
    for entry in path.iterdir() if path.is_dir() else ():
        if match := RANK.fullmatch(entry.name):
            files[int(match[1]), int(match[2] or 0)] = entry / FILE
    if not files:
        raise RequestError(f"{path} is not a legacy Megatron-LM checkpoint: it has no mp_rank folders")
    tensor, pipeline = (max(rank[axis] for rank in files) + 1 for axis in (0, 1))
    for rank in ((t, p) for t in range(tensor) for p in range(pipeline)):
        if rank not in files or not files[rank].is_file():
            raise DamagedError(f"{path}: the file of tensor rank {rank[0]}, pipeline rank {rank[1]} is missing")
    return files, (tensor, pipeline)


def _saved(file: Path) -> RankFile:
    saved = read_torch_file(file)
    if not isinstance(saved, dict):
        raise RequestError(f"{file}: not a checkpoint of Megatron-LM")
    chunks = {key: value for key, value in saved.items() if isinstance(key, str) and CHUNK.fullmatch(key)}
    for key, value in chunks.items():
        if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
            raise DamagedError(f"{file}: {key} is not a table of tensors by name")
    return RankFile(chunks, saved.get("args"), saved.get("iteration"))


def _chunk_names(chunks: Mapping[str, Mapping[str, object]], file: Path) -> list[str]:
    """Keys of the model chunks: `model`, or `model0`, `model1`, ... with a virtual pipeline."""
    names = ["model"] if "model" in chunks else sorted(chunks, key=lambda key: int(key[5:]))
    if not names:
        raise RequestError(f"{file}: it holds no model")
    if any("language_model" in chunks[name] for name in names):
        raise RequestError(
            f"{file}: the layout of models before megatron-core is not read; convert it with Megatron-LM"
        )
    return names


def _embedding_rows(tensors: Mapping[str, object], path: Path) -> int:
    """Rows of the padded vocabulary on one rank."""
    embedding = tensors.get(EMBEDDING)
    if not isinstance(embedding, StoredArray) or not embedding.shape:
        raise DamagedError(f"{path}: tensor {EMBEDDING} is missing from a rank's file")
    return embedding.shape[0]


def _layer_count(tensors: Mapping[str, object]) -> int:
    return max((int(match[1]) + 1 for name in tensors if (match := LAYER.match(name))), default=0)


def _progress(saved: RankFile) -> StagePosition:
    return StagePosition.of_others(saved.iteration, getattr(saved.arguments, "consumed_train_samples", None))
