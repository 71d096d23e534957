"""Safetensors files by their header: where each tensor lies, and new files laid out before their values are known.

The format: eight bytes with the length of a JSON header (little endian), the header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.logical import TensorInfo
from flm_megatron.errors import DamagedError, read_error
from flm_megatron.json_text import parse_json
from flm_megatron.storage.path import ObjectPath

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
LONGEST_HEADER = 10**8
"""Bytes; of a longer one the library says that it is too long."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def arrays_in(path: Path) -> dict[str, StoredArray]:
    """Where every tensor of a safetensors file lies.

    The library checks the header, without loading values: its length and form, that each tensor has the bytes of its
    shape and dtype, and that one begins where the other ends, from the header's end to the file's. Keys that stand
    twice, of which it takes one, are refused here. Raises DamagedError, also for a dtype that is not known;
    RequestError when its disk does not answer.
    """
    try:
        with path.open("rb") as file:  # first: the library says of whatever it cannot open that it is missing
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(min(length, LONGEST_HEADER))
            with _of_this_machine(path, struct.pack("<Q", length) + text) as checked, safe_open(checked, "pt"):
                pass
    except OSError as error:
        raise read_error(path, error) from error
    except (SafetensorError, struct.error, MemoryError) as error:
        raise DamagedError(f"{path}: not a whole safetensors file: {error}") from error
    header = parse_json(text, str(path), DamagedError, strict=True, name="a whole safetensors file")
    return {name: _array(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"}


@contextmanager
def _of_this_machine(path: Path, head: bytes) -> Iterator[Path]:
    """A file for the library, which opens no URL: there, one with the object's head and size and nothing else."""
    if not isinstance(path, ObjectPath):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="flm-header-") as file:
        file.write(head)
        file.truncate(path.stat().st_size)
        file.flush()
        yield Path(file.name)


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


def _array(path: Path, start: int, name: str, entry: dict) -> StoredArray:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise DamagedError(f"{path}: tensor {name} is of dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    return StoredArray(path, start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)
