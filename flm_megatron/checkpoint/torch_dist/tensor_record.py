"""One tensor inside a `.distcp` file: an archive of `torch.save`, whose values are a plain array."""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, cast

import torch
from isal.isal_zlib import crc32

from flm_megatron.checkpoint.files.block_checksums import CheckedFile, CheckedRun, read_fully, source_of
from flm_megatron.checkpoint.files.pickle.reader import StoredTensor, Unpickled, load_pickle
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.files.torch_file import ZIP_ERRORS, archive_error, load_torch_file, read_stored
from flm_megatron.errors import DamagedError, read_error
from flm_megatron.storage.path import location

ALIGNMENT = 64
LARGEST = 2**31  # bytes: above it an archive would need 64-bit entries
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")


def encode(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
    """The bytes before and after the values (`crc` is their CRC-32), so that `torch.load` reads the whole.

    The values begin at a multiple of 64 bytes from the start.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    assert nbytes < LARGEST, f"{nbytes} bytes in one record: split the tensor"
    files = [("data.pkl", _pickled(dtype, shape)), ("byteorder", b"little"), ("version", b"3\n")]
    entries, head = [], b""
    for name, data in files:
        entries.append(_entry(name, len(head), crc32(data), len(data)))
        head += _local(*entries[-1]) + data
    entries.append(_entry("data/0", len(head), crc, nbytes))
    start = len(head) + len(_local(*entries[-1]))
    head += _local(*entries[-1], padding=-start % ALIGNMENT)
    directory = b"".join(_central(*entry) for entry in entries)
    end = END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(head) + nbytes, 0)
    return head, directory + end


def record_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Size of the whole record of a tensor."""
    return math.prod(shape) * dtype.itemsize + sum(map(len, encode(dtype, shape, 0)))


def locate(
    path: Path, offset: int, length: int, checked: CheckedFile | None = None
) -> tuple[StoredArray, StoredTensor]:
    """The flat storage of the record at `offset` of `length` bytes, and the tensor's place in it.

    With `checked`, the checksums of the file's blocks, everything read is checked against them; without them the values
    are checked against the record's own checksum when they are first read. Raises DamagedError when the file is
    missing, truncated, changed, or holds something else there; RequestError when its disk does not answer.
    """
    try:
        with path.open("rb", buffering=0) as file, zipfile.ZipFile(_Window(file, offset, length, checked)) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            root = name.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise DamagedError(f"{path}: values are not stored in little-endian order")
            tensor = load_pickle(read_stored(archive, name), f"{path} at byte {offset}")
            if not isinstance(tensor, StoredTensor):
                raise DamagedError(f"{path}: no tensor at byte {offset}")
            info = archive.getinfo(f"{root}data/{tensor.key}")
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.file_size < tensor.storage_numel * tensor.dtype.itemsize
            ):
                raise DamagedError(f"{path}: values of the tensor at byte {offset} are incomplete")
            start = offset + info.header_offset
            header = LOCAL_HEADER.unpack(_read(file, start, LOCAL_HEADER.size, checked, path))
            data = start + LOCAL_HEADER.size + header[-2] + header[-1]
            own = checked or CheckedRun(path, data, info.file_size, info.CRC)
    except (OSError, *ZIP_ERRORS) as error:
        raise archive_error(path, error, f"cannot be read at byte {offset} (truncated?)") from error
    return StoredArray(path, data, (tensor.storage_numel,), tensor.dtype, own), tensor


def load_object(path: Path, offset: int, length: int) -> Unpickled:
    """The object that the record at `offset` of `length` bytes holds, its tensors in memory. Raises as `locate`."""
    try:
        with path.open("rb", buffering=0) as file:
            return load_torch_file(path, cast(IO[bytes], _Window(file, offset, length, None)))
    except OSError as error:
        raise read_error(path, error) from error


def _read(file: IO[bytes], position: int, size: int, checked: CheckedFile | None, path: Path) -> bytes:
    data = bytearray(size)
    if checked is not None:
        checked.read_into(source_of(file), memoryview(data), position)
    else:
        read_fully(source_of(file), memoryview(data), position, path)
    return bytes(data)


class _Storage:
    """Stands in for the values while the description of a tensor is pickled."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        kind = getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype])
        self.persistent_id = ("storage", kind, "0", "cpu", numel)


class _Tensor:
    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = _Storage(dtype, math.prod(shape))
        self.arguments: tuple[object, ...] = (storage, 0, tuple(shape), strides, False, collections.OrderedDict())

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        """The description of a storage; none for anything else."""
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Tensor(dtype, shape))
    return buffer.getvalue()


def _entry(name: str, position: int, crc: int, size: int) -> tuple[bytes, int, int, int]:
    return f"archive/{name}".encode(), position, crc, size


def _local(name: bytes, position: int, crc: int, size: int, padding: int = 0) -> bytes:
    extra = padding
    fields = LOCAL_HEADER.pack(b"PK\3\4", 20, 0, 0, 0, 0x21, crc, size, size, len(name), extra)
    return fields + name + b"\0" * extra


def _central(name: bytes, position: int, crc: int, size: int) -> bytes:
    return CENTRAL_HEADER.pack(
        b"PK\1\2", 20, 20, 0, 0, 0, 0x21, crc, size, size, len(name), 0, 0, 0, 0, 0, position
    ) + name  # fmt: skip


class _Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int, checked: CheckedFile | None) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0
        self.checked, self.path = checked, location(str(file.name))

    def seekable(self) -> bool:
        """`zipfile` asks: any place of the record can be read."""
        return True

    def readable(self) -> bool:
        """`io.BufferedReader` asks."""
        return True

    def tell(self) -> int:
        """Position in the range."""
        return self.position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move; returns the new position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, start + position)
        return self.position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, up to the end of the range."""
        left = max(0, self.length - self.position)
        data = _read(
            self.file, self.offset + self.position, left if size < 0 else min(size, left), self.checked, self.path
        )
        self.position += len(data)
        return data
