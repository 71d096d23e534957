"""Files of `torch.save`, without running anything they contain: where each tensor lies, or the tensors themselves.

Such a file is a zip archive of one pickle and of the bytes of each storage, uncompressed.
"""

from __future__ import annotations

import errno
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import torch

from flm_megatron.checkpoint.files.block_checksums import CheckedRun
from flm_megatron.checkpoint.files.pickle.reader import (
    FOREIGN,
    StoredTensor,
    load_pickle,
)
from flm_megatron.checkpoint.files.pickle.records import Unpickled
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.errors import DamagedError, FlmError, read_error

FOREIGN_PACKAGES = (*FOREIGN, "numpy", "torch")
"""Packages whose objects lie beside weights in training checkpoints: inert records, neither imported nor run."""
LOCAL_HEADER = struct.Struct("<26xHH")
Opened = tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], bytes]
ZIP_ERRORS = (zipfile.BadZipFile, struct.error, KeyError, ValueError, OverflowError, EOFError, RuntimeError)
"""What reading a damaged zip archive may raise besides OSError (RuntimeError is the base of NotImplementedError)."""


def read_torch_file(path: Path) -> Unpickled:
    """The saved object, with every tensor replaced by a `StoredArray`, which knows its checksum where there is one.

    Raises DamagedError for a damaged file, another format, or a pickle with names that could run code; RequestError
    when its disk does not answer.
    """
    with _opened(path) as (_, entries, text):
        return load_pickle(
            text, str(path), FOREIGN_PACKAGES, lambda tensor: _array(tensor, path, entries[f"data/{tensor.key}"])
        )


def load_torch_file(path: Path, record: IO[bytes] | None = None) -> Unpickled:
    """The saved object with its tensors in memory; those of one storage share it. For small files.

    With `record` what is read is that range of the file. Raises as `read_torch_file`; of classes fewer are known.
    """
    storages: dict[str, bytearray] = {}
    with _opened(path, record) as (archive, entries, text):

        def values(stored: StoredTensor) -> torch.Tensor:
            """Of one tensor."""
            if stored.key not in storages:
                storages[stored.key] = bytearray(read_stored(archive, entries[f"data/{stored.key}"].filename))
            return _materialise(stored, storages[stored.key])

        return load_pickle(text, str(path), tensor=values)


@contextmanager
def _opened(path: Path, record: IO[bytes] | None = None) -> Iterator[Opened]:
    """The archive, its entries by their names below its one folder, and its pickle."""
    try:
        with nullcontext(record) if record else path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if sum(entry.filename.partition("/")[2] == "data.pkl" for entry in archive.infolist()) != 1:
                raise DamagedError(f"{path}: not a file of torch.save")
            yield archive, entries, read_stored(archive, entries["data.pkl"].filename)
    except (OSError, *ZIP_ERRORS) as error:
        raise archive_error(path, error, "not a whole file of torch.save in its zip format") from error


def _array(tensor: StoredTensor, path: Path, entry: zipfile.ZipInfo) -> StoredArray:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise DamagedError(f"{path}: {entry.filename} is compressed; torch.save does not do that")
    if not _is_row_major(tensor):
        raise DamagedError(f"{path}: a tensor of shape {tensor.size} is stored with strides {tensor.stride}")
    if (tensor.offset + math.prod(tensor.size)) * tensor.dtype.itemsize > entry.file_size:
        raise DamagedError(f"{path}: a tensor of shape {tensor.size} in the {entry.file_size} bytes {entry.filename}")
    with path.open("rb") as file:  # the local header's extra field is not in the directory
        file.seek(entry.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    # Files that were laid out without values (`skip_data`, as our own writer does) record no checksum.
    checked = CheckedRun(path, start, entry.file_size, entry.CRC) if entry.CRC else None
    return StoredArray(path, start + tensor.offset * tensor.dtype.itemsize, tensor.size, tensor.dtype, checked)


def _is_row_major(tensor: StoredTensor) -> bool:
    numel = 1
    for size, stride in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        if size != 1 and stride != numel:
            return 0 in tensor.size
        numel *= size
    return True


def _materialise(stored: StoredTensor, data: bytearray) -> torch.Tensor:
    flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
    return flat.as_strided(stored.size, stored.stride, stored.offset)


def archive_error(path: Path, error: Exception, damaged: str) -> FlmError:
    """What an `error` of ZIP_ERRORS, or OSError, says about the zip archive at `path`: that it is damaged, in the
    words `damaged`, or that its disk does not answer."""
    answer = error if isinstance(error, OSError) else error.__context__  # zipfile hides what a read raises
    if isinstance(answer, OSError) and answer.errno != errno.EINVAL:  # which is a place before the file's beginning
        return read_error(path, answer)
    return DamagedError(f"{path}: {damaged}: {error!r:.200}")


def read_stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry that is not compressed (torch compresses none). Raises KeyError without it, ValueError if it is."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(info)
