"""A folder of Hugging Face shards as a logical checkpoint: any region of our tensors, read from theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.files.torch_file import read_torch_file
from flm_megatron.checkpoint.hugging_face.config import read_json
from flm_megatron.checkpoint.hugging_face.families.registry import family_of
from flm_megatron.checkpoint.hugging_face.names import RegionPair, bands_of, region_pairs, target_tensors
from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.regions import slice_axis, split_region
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.model.parameters import EMBEDDING, HEAD, parameter_specs
from flm_megatron.paths import is_file_name
from flm_megatron.storage.path import location

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
IGNORED = "rotary_emb.inv_freq"
"""Suffix of buffers that old exports stored and that follow from the configuration."""


class HuggingFaceCheckpoint(LogicalCheckpoint):
    """Weights of a model of a known family in Hugging Face form, safetensors or pickled (read without running it).

    `config` is the model its `config.json` describes, `family` its family. It has no optimizer state and its manifest
    is empty. `vocab_size` gives the true vocabulary where the files are padded and the configuration does not record
    it, as `true_vocab_size` does.

    Raises:
        RequestError: not such a folder, a family that is not known, or tensors that do not fit it.
        DamagedError: a shard is missing, truncated or unreadable.
    """

    def __init__(self, path: Path | str, vocab_size: int | None = None) -> None:
        self.path = location(path)
        self.settings = read_json(self.path / "config.json")
        self.family = family_of(self.settings, str(self.path))
        self.config = self.family.model(self.settings, str(self.path))
        self.manifest = Manifest()
        self._arrays = _whole_names(stored_arrays(self.path), self.family.body)
        self._set_vocabulary(vocab_size)
        if self.config.tie_embeddings:
            self._drop_head()
        self._check_shapes()
        self._bands = bands_of(self.config, self.family)
        self._specs = parameter_specs(self.config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(spec.shape, self._dtype(name)) for name, spec in self._specs.items()
        }

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        if name not in self.tensors:
            raise RequestError(f"{self.path}: no tensor {name}; a Hugging Face checkpoint has weights only")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        out = torch.empty(region.sizes, dtype=info.dtype)
        for pair in region_pairs(self._bands[name], self._specs[name].stacked, region):
            array = self._array(pair.target)
            values = (_read_turned if pair.transposed else StoredArray.read)(array, pair.target_region)
            if self._specs[name].kind == "norm" and self.family.norm_offset:
                values = values.to(out.dtype) + self.family.norm_offset
            out[pair.region.within(region).slices] = values.reshape(pair.region.sizes)
        return out

    def _drop_head(self) -> None:
        """Leave out a head that is stored beside the embedding that it is. Raises RequestError if it is another.

        Of such files transformers 4 uses the embedding, transformers 5 the head.
        """
        embedding, name = self._array(self._target(EMBEDDING)), self._target(HEAD)
        head = self._arrays.pop(name, embedding)
        if head is not embedding and not _same_values(head, embedding):
            raise RequestError(
                f"{self.path}: config.json has tie_word_embeddings True, and an {name} is stored that is not "
                "the embedding: set it to false if that is the head, or take the tensor out of the files"
            )

    def _dtype(self, name: str) -> torch.dtype:
        """dtype of a logical tensor: that of the tensors it is made of, the wider one if they differ.

        Norms to which an offset is added are in fp32 at least, in which small weights are not lost beside it.
        """
        dtypes = {self._array(pair.target).dtype for pair in self._pairs(name)}
        if self._specs[name].kind == "norm" and self.family.norm_offset:
            dtypes.add(torch.float32)
        result = dtypes.pop()
        for dtype in dtypes:
            result = torch.promote_types(result, dtype)
        return result

    def _pairs(self, name: str) -> Iterator[RegionPair]:
        spec = self._specs[name]
        return region_pairs(self._bands[name], spec.stacked, Region.whole(spec.shape))

    def _target(self, name: str) -> str:
        """The family's name of a weight that is one of its tensors."""
        return f"{self.family.modules[name.removesuffix('.weight')]['']}.weight"

    def _array(self, name: str) -> StoredArray:
        if name not in self._arrays:
            raise DamagedError(f"{self.path}: tensor {name} is missing")
        return self._arrays[name]

    def _set_vocabulary(self, vocab_size: int | None) -> None:
        stored = self._array(self._target(EMBEDDING)).shape[0]
        if not self.settings.get("true_vocab_size"):
            self.config.vocab_size = vocab_size or self.config.vocab_size
        if not self.config.vocab_size or self.config.vocab_size > stored:
            raise RequestError(f"{self.path}: vocabulary {self.config.vocab_size} asked for, {stored} stored")

    def _check_shapes(self) -> None:
        """Raise RequestError if a tensor does not fit the configuration or is not one of its tensors."""
        wanted = target_tensors(self.config, self.family)
        for name, target in wanted.items():
            shape = self._array(name).shape
            fits = shape == target.shape or (target.padded and shape[1:] == target.shape[1:])
            if not fits or shape[0] < target.shape[0]:
                raise RequestError(f"{self.path}: {name} has shape {shape}, config.json asks for {target.shape}")
        ignored = (IGNORED, *self.family.buffers)
        strange = [name for name in self._arrays if name not in wanted and not name.endswith(ignored)]
        if strange:
            raise RequestError(f"{self.path}: tensor {strange[0]} is not one of the configured model")


def _whole_names(arrays: dict[str, StoredArray], body: str) -> dict[str, StoredArray]:
    """`arrays` by their names in the model with a head, whose `body` files of the bare model leave out."""
    if any(name.startswith(body) for name in arrays):
        return arrays
    return {f"{body}{name}": array for name, array in arrays.items()}


def _read_turned(array: StoredArray, region: Region) -> torch.Tensor:
    """A region of a stored matrix, transposed: BUFFER_BYTES of the rows that it is a part of at a time, as what lies
    between its own runs of bytes may be mapped into memory with them."""
    rows = max(1, BUFFER_BYTES // (array.shape[1] * array.dtype.itemsize))
    starts = range(0, region.sizes[0], rows)
    parts = [array.read(slice_axis(region, 0, at, min(rows, region.sizes[0] - at))) for at in starts]
    return torch.cat(parts).t()


def _same_values(one: StoredArray, other: StoredArray) -> bool:
    """Whether two arrays hold the same values; at most BUFFER_BYTES of each are in memory."""
    if one.shape != other.shape:
        return False
    regions = split_region(Region.whole(one.shape), BUFFER_BYTES // one.dtype.itemsize)
    return all(torch.equal(one.read(region), other.read(region)) for region in regions)


def stored_arrays(path: Path) -> dict[str, StoredArray]:
    """Where every tensor of a Hugging Face folder lies, by its name there.

    Raises RequestError if there are no weights, DamagedError if a shard the index names is missing.
    """
    for index, single in zip(INDEXED, SINGLE, strict=True):
        if (path / index).is_file():
            return _from_index(path, index)
        if (path / single).is_file():
            return _arrays_of(path / single)
    raise RequestError(f"{path}: no weights; one of {', '.join(INDEXED + SINGLE)} was expected")


def _from_index(path: Path, index: str) -> dict[str, StoredArray]:
    content = read_json(path / index)
    names = content.get("weight_map")
    if not isinstance(names, dict):
        raise DamagedError(f"{path / index}: it has no weight_map")
    for shard in names.values():
        if not is_file_name(shard):
            raise RequestError(f"{path / index}: shard {_shown(shard)} lies outside the folder")
    shards = {}
    for shard in sorted(set(names.values())):
        if not (path / shard).is_file():
            raise DamagedError(f"{path}: shard {shard} is missing")
        shards[shard] = _arrays_of(path / shard)
    for name, shard in names.items():
        if name not in shards[shard]:
            raise DamagedError(f"{path / shard}: tensor {name} is missing; {index} says it is there")
    _check_shards(path / index, names, shards)
    arrays = {name: shards[shard][name] for name, shard in names.items()}
    _check_total(path / index, content.get("metadata"), sum(array.nbytes for array in arrays.values()))
    return arrays


def _check_shards(index: Path, names: dict[str, str], shards: dict[str, dict[str, StoredArray]]) -> None:
    """Raise DamagedError for a tensor that is not where the index says, or not there alone."""
    for shard, arrays in shards.items():
        for name in arrays:
            if names.get(name) != shard:
                raise DamagedError(
                    f"{index}: says that tensor {name} lies in {names.get(name)}, it lies in {shard} too"
                )


def _check_total(index: Path, metadata: object, nbytes: int) -> None:
    """Raise DamagedError if the total that an index gives is not that of its tensors."""
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != nbytes:
        raise DamagedError(
            f"{index}: says that its tensors have {_shown(total)} bytes, they have {nbytes} (if the weights are right, "
            "take total_size out of it)"
        )


def _shown(value: object) -> str:
    return repr(value)[:80]


def _arrays_of(path: Path) -> dict[str, StoredArray]:
    if path.suffix == ".safetensors":
        return arrays_in(path)
    saved = read_torch_file(path)
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, StoredArray) for name, value in saved.items()
    ):
        raise RequestError(f"{path}: a dictionary of tensors was expected")
    return dict(saved)
