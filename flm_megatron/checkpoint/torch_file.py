"""Files of `torch.save`: where each tensor lies, without loading values and without running anything they contain.

Such a file is a zip archive of one pickle and of the bytes of each storage, uncompressed.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from flm_megatron.checkpoint.stored_array import StoredArray
from flm_megatron.checkpoint.unpickle import Foreign, SafeUnpickler, StoredTensor
from flm_megatron.errors import DamagedError, FlmError

FOREIGN_PACKAGES = ("megatron", "numpy", "torch")
"""Packages whose objects lie beside weights in training checkpoints: inert records, neither imported nor run."""
LOCAL_HEADER = struct.Struct("<26xHH")


def read_torch_file(path: Path) -> Any:
    """The saved object, with every tensor replaced by a `StoredArray`.

    Raises DamagedError for a damaged file, another format, or a pickle with names that could run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            text = archive.read(entries["data.pkl"])
        return _replace(_Unpickler(io.BytesIO(text), str(path)).load(), path, entries)
    except FlmError:
        raise
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a broken pickle may raise anything
        raise DamagedError(f"{path}: not a whole file of torch.save in its zip format: {error!r}") from error


class _Unpickler(SafeUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name, or an inert record for one of a known package."""
        try:
            return super().find_class(module, name)
        except DamagedError:
            if module.partition(".")[0] in FOREIGN_PACKAGES:
                return Foreign
            raise


def _replace(value: Any, path: Path, entries: dict[str, zipfile.ZipInfo]) -> Any:
    """`value` with its tensors as arrays of the file."""
    if isinstance(value, StoredTensor):
        return _array(value, path, entries[f"data/{value.key}"])
    if isinstance(value, dict):
        return {key: _replace(part, path, entries) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(part, path, entries) for part in value)
    return value


def _array(tensor: StoredTensor, path: Path, entry: zipfile.ZipInfo) -> StoredArray:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise DamagedError(f"{path}: {entry.filename} is compressed; torch.save does not do that")
    if not torch.empty_strided(tensor.size, tensor.stride, device="meta").is_contiguous():
        raise DamagedError(f"{path}: a tensor of shape {tensor.size} is stored with strides {tuple(tensor.stride)}")
    with path.open("rb") as file:  # the local header's extra field is not in the directory
        file.seek(entry.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    return StoredArray(path, start + tensor.offset * tensor.dtype.itemsize, tensor.size, tensor.dtype)
