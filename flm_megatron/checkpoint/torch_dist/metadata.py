"""`.metadata` of torch.distributed.checkpoint as plain data: tensors with their chunks, and where each is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flm_megatron.checkpoint.files.pickle.reader import MAX_DIMENSIONS, dtype_of, load_records, without_collector
from flm_megatron.checkpoint.files.pickle.records import Name, Record
from flm_megatron.errors import DamagedError
from flm_megatron.paths import is_file_name

PACKAGE = "torch.distributed.checkpoint"
METADATA = f"{PACKAGE}.metadata.Metadata"
TENSOR = f"{PACKAGE}.metadata.TensorStorageMetadata"
CHUNK = f"{PACKAGE}.metadata.ChunkStorageMetadata"
PROPERTIES = f"{PACKAGE}.metadata.TensorProperties"
INDEX = f"{PACKAGE}.metadata.MetadataIndex"
PLACE = f"{PACKAGE}.filesystem._StorageInfo"
SIZE = "torch.Size"
LARGEST = 2**62  # any size, offset or length is below it
Sizes = tuple[int, ...]


class StoredPlace(NamedTuple):
    """Where a record lies: file within the folder, first byte, length; whether its bytes are transformed."""

    relative_path: str
    offset: int
    length: int
    transformed: bool


@dataclass(frozen=True)
class StoredEntry:
    """A tensor as the metadata has it; `chunks` are offsets and sizes. One of bytes has neither dtype nor chunks."""

    size: Sizes = ()
    dtype: torch.dtype | None = None
    chunks: tuple[tuple[Sizes, Sizes], ...] = ()


@dataclass(frozen=True)
class StoredMetadata:
    """Entries by name, and the place of each chunk by name and offsets, and of each record of bytes by name."""

    entries: dict[str, StoredEntry]
    places: dict[tuple[str, Sizes], StoredPlace]
    of_bytes: dict[str, StoredPlace]


def parse_metadata(data: bytes, source: str) -> StoredMetadata:
    """Parse the bytes of a `.metadata`. Raises DamagedError, naming `source`, for anything else."""
    with without_collector(len(data)):
        metadata = _parsed(load_records(data, source), source)
    for file in {place.relative_path for place in (*metadata.places.values(), *metadata.of_bytes.values())}:
        if not is_file_name(file):
            raise DamagedError(f"{source}: a tensor is said to lie outside of the folder: {file!r:.200}")
    return metadata


def _parsed(said: object, source: str) -> StoredMetadata:
    try:
        fields = _fields(said, METADATA)
        entries, storage = fields["state_dict_metadata"], fields.get("storage_data") or {}
        if type(entries) is not dict or type(storage) is not dict:
            raise ValueError("it has no tables")
        return StoredMetadata(
            {_text(name): _entry(entry) for name, entry in entries.items()},
            {key: _place(info) for index, info in storage.items() if (key := _key(index))},
            {_text(_fields(index, INDEX)["fqn"]): _place(info) for index, info in storage.items() if not _key(index)},
        )
    except (ValueError, KeyError) as error:
        raise DamagedError(f"{source}: is not the metadata of a checkpoint: {error}") from error


def _entry(record: object) -> StoredEntry:
    if type(record) is Record and record.path != TENSOR:
        return StoredEntry()  # bytes
    fields = _fields(record, TENSOR)
    size, chunks = _sizes(fields["size"]), fields["chunks"]
    if type(chunks) is not list:
        raise ValueError("a tensor without chunks")
    return StoredEntry(size, _dtype(fields["properties"]), tuple(_chunk(chunk, size) for chunk in chunks))


def _chunk(record: object, size: Sizes) -> tuple[Sizes, Sizes]:
    fields = _fields(record, CHUNK)
    offsets, sizes = _sizes(fields["offsets"]), _sizes(fields["sizes"])
    if not len(offsets) == len(sizes) == len(size):
        raise ValueError(f"a chunk of {len(sizes)} dimensions in a tensor of {len(size)}")
    for offset, count, end in zip(offsets, sizes, size, strict=True):
        if offset + count > end:
            raise ValueError(f"a chunk of {sizes} at {offsets} in a tensor of {size}")
    return offsets, sizes


def _key(record: object) -> tuple[str, Sizes] | None:
    """Name and offsets; none for an entry of bytes, which has no offsets."""
    fields = _fields(record, INDEX)
    offset = fields.get("offset")
    return None if offset is None else (_text(fields["fqn"]), _sizes(offset))


def _place(record: object) -> StoredPlace:
    fields = _fields(record, PLACE)
    return StoredPlace(
        _text(fields["relative_path"]),
        _count(fields["offset"]),
        _count(fields["length"]),
        bool(fields.get("transform_descriptors")),
    )


def _dtype(record: object) -> torch.dtype:
    """dtype of TensorProperties, whose state is its fields, in old torch a tuple of them that begins with it."""
    state = record.state if type(record) is Record and record.path == PROPERTIES else None
    said = state.get("dtype") if type(state) is dict else state[0] if type(state) is tuple and state else None
    dtype = dtype_of(said.path) if type(said) is Name else None
    if dtype is None:
        raise ValueError("a tensor without a dtype")
    return dtype


def _fields(record: object, path: str) -> dict[str, object]:
    if type(record) is not Record or record.path != path or type(record.state) is not dict:
        raise ValueError(f"{path} was expected, not {getattr(record, 'path', type(record).__name__)}")
    return record.state


def _sizes(said: object) -> Sizes:
    """A torch.Size: at most 64 counts."""
    if type(said) is not Record or said.path != SIZE or len(said.args) != 1:
        raise ValueError("sizes were expected")
    sizes = said.args[0]
    if type(sizes) is not tuple or len(sizes) > MAX_DIMENSIONS:
        raise ValueError("sizes were expected")
    for size in sizes:
        if type(size) is not int or not 0 <= size < LARGEST:
            raise ValueError("sizes that are no counts")
    return sizes


def _count(said: object) -> int:
    if type(said) is not int or not 0 <= said < LARGEST:
        raise ValueError(f"{said!r:.40} is no count" if type(said) is int else "a count was expected")
    return said


def _text(said: object) -> str:
    if type(said) is not str:
        raise ValueError("a name was expected")
    return said
