"""Reading pickles of checkpoints: from what they say, values of types that this file chooses.

`run_pickle` makes plain data and records without looking anything up; here a record whose path is known becomes
a value (`torch.Size` a tuple, a tensor a `StoredTensor`, arguments a Namespace), after its parts were checked. Classes
that Megatron-LM stores beside them stay inert records (`Foreign`); a name of any other package ends the reading.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flm_megatron.checkpoint.files.pickle.machine import run_pickle
from flm_megatron.checkpoint.files.pickle.records import SCALARS, STORAGE, Name, PickleError, Record, Unpickled
from flm_megatron.errors import DamagedError

CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
    "collections": ("OrderedDict",),
    "argparse": ("Namespace",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "builtins": ("set", "frozenset", "bytes", "complex", "slice"),
    "_codecs": ("encode",),
}
"""Names that a checkpoint has a use for, besides torch's dtypes, layouts and storages. None is ever looked up."""
FOREIGN = ("megatron", "transformer_engine", "signal")
"""Packages whose classes lie among Megatron-LM's arguments."""
LARGEST_PICKLE = 256 * 2**20
"""Bytes. The metadata of a 1T model's checkpoint has 38 MB at 245,000 regions, and takes 20 times that in memory."""
SMALL_PICKLE = 2**16  # bytes, below which the collector of cyclic garbage makes no difference
MAX_DIMENSIONS = 64
DEEPEST = 100
_UNDER_WAY = object()
_COLLECTOR = threading.RLock()


class Foreign:
    """Stands for an object of a class that is not loaded: the path of its class, and what was said about it."""

    def __init__(self, path: str, args: tuple[Unpickled, ...] = (), state: Unpickled = None) -> None:
        self.path, self.args, self.state = path, args, state


class StoredTensor:
    """Where the values of a pickled tensor lie: storage `key`, its dtype, and the tensor's place in it."""

    def __init__(
        self, storage: tuple[torch.dtype, str, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.dtype, self.key, self.storage_numel = storage
        self.offset, self.size, self.stride = offset, size, stride


def load_records(data: bytes, source: str, foreign: tuple[str, ...] = FOREIGN) -> object:
    """What a pickle says, as plain data, `Name`s and `Record`s. Raises DamagedError as `load_pickle`."""

    def policy(module: str, name: str) -> None:
        """Raise DamagedError for a name that is not known."""
        if name in CLASSES.get(module, ()) or (module == "torch" and name in _KINDS):
            return
        if module.partition(".")[0] not in foreign or "." in name:
            raise DamagedError(f"{source}: names {module}.{name}, which a checkpoint has no use for; not loaded")

    if len(data) > LARGEST_PICKLE:
        raise DamagedError(f"{source}: a pickle of {len(data):,} bytes, more than {LARGEST_PICKLE:,}")
    try:
        with without_collector(len(data)):
            return run_pickle(data, policy)
    except (ValueError, OverflowError, MemoryError) as error:
        raise DamagedError(f"{source}: cannot be unpickled: {error or type(error).__name__}") from error


def load_pickle(
    data: bytes,
    source: str,
    foreign: tuple[str, ...] = FOREIGN,
    tensor: Callable[[StoredTensor], object] | None = None,
) -> Unpickled:
    """The object in a pickle; `tensor` makes what stands for a tensor, a `StoredTensor` if not given.

    `foreign` are the packages of which any class may lie in it, as a `Foreign`. Raises DamagedError, naming `source`,
    when it is broken, holds itself, is nested too deeply, or names anything else.
    """
    said = load_records(data, source, foreign)
    try:
        return _Values(tensor or (lambda stored: stored)).of(said)
    except (PickleError, RecursionError) as error:
        raise DamagedError(f"{source}: cannot be unpickled: {error}") from error


class _Values:
    """Turns what a pickle says into values, each shared part once, so that the time is that of the pickle's length."""

    def __init__(self, tensor: Callable[[StoredTensor], object]) -> None:
        self.tensor = tensor
        self.depth = 0
        self.done: dict[int, object] = {}
        self.makers: dict[str, Callable[[Record], object]] = {
            "torch.Size": lambda record: self._plain(tuple, record),
            "collections.OrderedDict": self._mapping,
            "argparse.Namespace": self._namespace,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda record: self.of(record.args[0]),
            "builtins.set": lambda record: self._plain(set, record),
            "builtins.frozenset": lambda record: self._plain(frozenset, record),
            "builtins.bytes": self._no_bytes,
            "_codecs.encode": self._bytes,
            **dict.fromkeys(_PATHS, self._path),
        }

    def of(self, said: object) -> Unpickled:
        """The value of what was said. Raises PickleError."""
        if type(said) in SCALARS:
            return said
        found = self.done.get(id(said))
        if found is _UNDER_WAY or self.depth > DEEPEST:
            raise PickleError("it holds itself" if found is _UNDER_WAY else f"it is nested {DEEPEST} deep")
        if found is None:
            self.done[id(said)], self.depth = _UNDER_WAY, self.depth + 1
            found = self.done[id(said)] = self._of(said)
            self.depth -= 1
        return found

    def _of(self, said: object) -> object:
        if type(said) is dict:
            return {self._key(key): self.of(value) for key, value in said.items()}
        if type(said) is list or type(said) is tuple:
            return type(said)(map(self.of, said))
        if type(said) is set or type(said) is frozenset:
            return type(said)(map(self._key, said))
        if type(said) is Name:
            return dtype_of(said.path) or Foreign(said.path)
        assert type(said) is Record, "run_pickle makes nothing else"
        maker = self.makers.get(said.path)
        if maker is None:
            return Foreign(said.path, self.of(said.args), self.of(said.state))
        try:
            return maker(said)
        except PickleError:
            raise
        except (IndexError, TypeError, ValueError) as error:
            raise PickleError(f"{said.path}: {error}") from None

    def _key(self, said: object) -> Unpickled:
        """A key, whose hash takes no time (as run_pickle sees to for what is said)."""
        key = self.of(said)
        parts = key if type(key) is tuple else (key,)
        if any(type(part) not in SCALARS and not isinstance(part, torch.dtype | Foreign) for part in parts):
            raise PickleError(f"a {type(key).__name__} as a key")
        return key

    def _plain(self, kind: type, record: Record) -> object:
        """A tuple or set of the one argument, a list or tuple of what can be a key."""
        (parts,) = record.args or ((),)
        if type(parts) not in (list, tuple):
            raise PickleError(f"{record.path} of something else than a list")
        return kind(map(self._key, parts))

    def _mapping(self, record: Record) -> dict[object, object]:
        pairs = [*(record.args[0] if record.args else ()), *record.items]
        return {self._key(key): self.of(value) for key, value in pairs}

    def _namespace(self, record: Record) -> argparse.Namespace:
        fields = self.of(record.state)
        if type(fields) is not dict or any(type(name) is not str for name in fields):
            raise PickleError("arguments without names")
        namespace = argparse.Namespace()
        vars(namespace).update(fields)
        return namespace

    def _path(self, record: Record) -> pathlib.PurePosixPath:
        if any(type(part) is not str for part in record.args):
            raise PickleError("a path of something else than text")
        return pathlib.PurePosixPath(*record.args)

    def _no_bytes(self, record: Record) -> bytes:
        """How protocol 2 says b""."""
        if record.args:
            raise PickleError("bytes made of something")
        return b""

    def _bytes(self, record: Record) -> bytes:
        text, encoding = record.args
        if type(text) is not str or encoding != "latin1":
            raise PickleError("bytes in an unknown encoding")
        return text.encode("latin1")

    def _tensor(self, record: Record) -> object:
        storage, offset, size, stride = (self.of(part) for part in record.args[:4])
        if not isinstance(storage, Foreign) or storage.path != STORAGE:
            raise PickleError("a tensor without a storage")
        places = (offset, *size, *stride)
        if any(type(place) is not int or not 0 <= place < 2**62 for place in places):
            raise PickleError(f"a tensor at impossible places {places!r:.200}")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise PickleError("size and stride of a tensor do not fit")
        return self.tensor(StoredTensor(_storage(storage.args[0]), offset, tuple(size), tuple(stride)))


def dtype_of(path: str) -> torch.dtype | None:
    """The dtype that a name such as `torch.bfloat16` or `torch.BFloat16Storage` stands for; none for another name."""
    return _KINDS.get(path.removeprefix("torch."))


def _storage(said: object) -> tuple[torch.dtype, str, int]:
    """dtype, key and number of values of a storage."""
    match said:
        case ("storage", torch.dtype() as dtype, str() as key, str(), int() as numel) if 0 <= numel < 2**62:
            return dtype, key, numel
    raise PickleError("it does not describe its tensors as torch.save does")


@contextmanager
def without_collector(size: int) -> Iterator[None]:
    """While the millions of objects of a pickle of `size` bytes are made: looking for garbage among them, when all of
    them stay, would take a third of the time."""
    if size < SMALL_PICKLE:
        yield
        return
    with _COLLECTOR:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


_PATHS = [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
# By the name in torch: dtypes, and the storages that old pickles name in their place.
_KINDS: dict[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
} | {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
