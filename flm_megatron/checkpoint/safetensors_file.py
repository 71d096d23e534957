"""Safetensors files by their header: where each tensor lies, and new files laid out before their values are known.

The format: eight bytes with the length of a JSON header (little endian), the header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from flm_megatron.checkpoint.logical import TensorInfo
from flm_megatron.checkpoint.stored_array import StoredArray
from flm_megatron.errors import DamagedError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


def arrays_in(path: Path) -> dict[str, StoredArray]:
    """Where every tensor of a safetensors file lies. Raises DamagedError for a bad header or a truncated file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, size):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        arrays = {name: _array(path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise DamagedError(f"{path}: not a whole safetensors file: {error}") from error
    for name, array in arrays.items():
        if array.offset + array.nbytes > size:
            raise DamagedError(f"{path}: truncated: tensor {name} ends at byte {array.offset + array.nbytes} of {size}")
    return arrays


def lay_out(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, StoredArray]:
    """Write the header of a file that will hold `tensors`, make it as long as it will be, and say where each goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        end = position + math.prod(info.shape) * info.dtype.itemsize
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return arrays_in(path)


def _array(path: Path, start: int, entry: dict) -> StoredArray:
    begin, end = entry["data_offsets"]
    array = StoredArray(path, start + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if array.nbytes != end - begin:
        raise ValueError(f"{end - begin} bytes for shape {array.shape}")
    return array
