"""Files of `torch.save`: where each tensor lies, without loading values and without running anything they contain.

Such a file is a zip archive of one pickle and of the bytes of each storage, uncompressed.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.files.block_checksums import CheckedRun
from flm_megatron.checkpoint.files.pickle.reader import (
    FOREIGN,
    ZIP_ERRORS,
    StoredTensor,
    archive_error,
    load_pickle,
    read_stored,
)
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.errors import DamagedError

FOREIGN_PACKAGES = (*FOREIGN, "numpy", "torch")
"""Packages whose objects lie beside weights in training checkpoints: inert records, neither imported nor run."""
LOCAL_HEADER = struct.Struct("<26xHH")


def read_torch_file(path: Path) -> Any:
    """The saved object, with every tensor replaced by a `StoredArray`, which knows its checksum where there is one.

    Raises DamagedError for a damaged file, another format, or a pickle with names that could run code; RequestError
    when its disk does not answer.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            text = read_stored(archive, entries["data.pkl"].filename)
        return load_pickle(
            text, str(path), FOREIGN_PACKAGES, lambda tensor: _array(tensor, path, entries[f"data/{tensor.key}"])
        )
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
