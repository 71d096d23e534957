"""Reading pickles of checkpoints without running anything that they name.

Only the plain data types that checkpoints are made of are rebuilt. Classes that Megatron-LM stores among its
arguments (megatron-core's, Transformer Engine's, signals) become inert records: they are neither imported nor called.
Any other global is refused.
"""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint.filesystem
import torch.distributed.checkpoint.metadata
import torch.distributed.checkpoint.planner

from flm_megatron.errors import DamagedError

METADATA_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
PLANNER_CLASSES = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
INERT = ("megatron", "transformer_engine", "signal")  # packages whose classes become Foreign
MAX_DIMENSIONS = 64


class Foreign:
    """Stands for an object of a class that is not loaded; its state is kept as data, nothing of it runs."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StoredTensor:
    """Where the values of a pickled tensor lie: storage `key`, its dtype, and the tensor's place in it."""

    def __init__(
        self, storage: tuple[torch.dtype, str, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.dtype, self.key, self.storage_numel = storage
        self.offset, self.size, self.stride = offset, tuple(size), tuple(stride)


class SafeUnpickler(pickle.Unpickler):
    """Unpickler that rebuilds listed types only; tensors become StoredTensor. `source` names the file in errors."""

    def __init__(self, file: IO[bytes], source: str) -> None:
        super().__init__(file)
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name. Raises DamagedError for any other."""
        if (found := _ALLOWED.get((module, name))) is not None:
            return found
        if module == "torch":
            value = getattr(torch, name, None)
            if isinstance(value, torch.dtype | torch.layout):
                return value
            if name in _STORAGES:
                return _STORAGES[name]
        if module.split(".")[0] in INERT and "." not in name:
            return Foreign
        raise DamagedError(f"{self.source}: names {module}.{name}, which a checkpoint has no use for; not loaded")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        """The description of a storage: dtype, key, number of values."""
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as numel):
                return dtype, key, numel
        raise DamagedError(f"{self.source}: does not describe its tensors as torch.save does")


def load_pickle(data: bytes, source: str) -> Any:
    """The object in a pickle. Raises DamagedError, naming `source`, when it is broken or names a forbidden global."""
    try:
        return SafeUnpickler(io.BytesIO(data), source).load()
    except DamagedError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise DamagedError(f"{source}: cannot be unpickled: {type(error).__name__}: {error}") from error


def read_pickle(path: Path) -> Any:
    """The object in a pickle file. Raises DamagedError when it is missing, broken or names a forbidden global."""
    try:
        return load_pickle(path.read_bytes(), str(path))
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_torch_file(path: Path) -> Any:
    """The object in a file of `torch.save`, with its tensors. Raises DamagedError as `read_pickle`."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise DamagedError(f"{path}: not a file of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            tree = load_pickle(archive.read(pickles[0]), str(path))
            return _map_tensors(tree, lambda t: _materialise(t, archive.read(f"{root}data/{t.key}")))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError, RecursionError) as error:
        raise DamagedError(f"{path}: not a whole file of torch.save: {error}") from error


def _materialise(stored: StoredTensor, data: bytes) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
    return flat.as_strided(stored.size, stored.stride, stored.offset)


def _map_tensors(value: Any, change: Callable[[StoredTensor], Any]) -> Any:
    if isinstance(value, StoredTensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((k, _map_tensors(v, change)) for k, v in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(_map_tensors(v, change) for v in value)
    return value


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError("size and stride of a tensor do not fit")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    return data


def _allowed() -> dict[tuple[str, str], Any]:
    checkpoint = torch.distributed.checkpoint
    table: dict[tuple[str, str], Any] = {
        (checkpoint.metadata.__name__, name): getattr(checkpoint.metadata, name) for name in METADATA_CLASSES
    }
    table |= {(checkpoint.planner.__name__, name): getattr(checkpoint.planner, name) for name in PLANNER_CLASSES}
    table[checkpoint.filesystem.__name__, "_StorageInfo"] = checkpoint.filesystem._StorageInfo
    table["torch", "Size"] = torch.Size
    table["torch", "device"] = torch.device
    table["torch.serialization", "_get_layout"] = _layout
    table["torch._utils", "_rebuild_tensor_v2"] = _rebuild_tensor
    table["torch._utils", "_rebuild_parameter"] = _rebuild_parameter
    table["collections", "OrderedDict"] = collections.OrderedDict
    table["argparse", "Namespace"] = argparse.Namespace
    for module in ("pathlib", "pathlib._local"):
        table |= {(module, name): pathlib.PurePosixPath for name in ("PosixPath", "PurePosixPath")}
    table |= {("builtins", kind.__name__): kind for kind in (set, frozenset, complex, slice)}
    table["_codecs", "encode"] = _encode
    return table


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise ValueError(f"no tensor layout {name!r}")
    return layout


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes stored as {encoding!r}")
    return text.encode("latin1")


_STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
_ALLOWED = _allowed()
