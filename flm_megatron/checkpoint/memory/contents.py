"""The header of a blob, which describes its bytes, as plain JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.sharding.snapshot import Stored, placed
from flm_megatron.errors import DamagedError
from flm_megatron.json_text import JsonObject

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class BlobRegion:
    """A region of a logical tensor in a blob, row-major, from byte `position` on."""

    name: str
    region: Region
    position: int


def header_of(
    tensors: Mapping[str, TensorInfo], stored: Sequence[Stored], world: int, manifest: Manifest
) -> dict[str, object]:
    """The header of a blob that holds `stored` as `snapshot` lays them out; `manifest` has a stage and a step."""
    names = {name: number for number, name in enumerate(tensors)}
    positions, _ = placed(stored)
    at = manifest.position
    return {
        "world": world,
        "stage": at.stage,
        "step": at.step,
        "manifest": manifest.to_json(),
        "tensors": [[name, str(info.dtype), info.shape] for name, info in tensors.items()],
        "parts": [
            [names[name], region.offsets, region.sizes, position]
            for (name, region, _), position in zip(stored, positions, strict=True)
        ],
    }


def manifest_of(header: JsonObject) -> Manifest:
    """The manifest in a header. Raises DamagedError if there is none."""
    saved = header.get("manifest")
    manifest = Manifest.from_json(saved if isinstance(saved, dict) else {}, "a copy in memory")
    if manifest.position.stage is None or manifest.position.step is None:
        raise DamagedError("the description of a copy in memory is not understood: it has no manifest")
    return manifest


def tensors_of(header: JsonObject) -> dict[str, TensorInfo]:
    """The tensors that a header names. Raises DamagedError where it is not one."""
    try:
        return {
            str(name): TensorInfo(tuple(map(int, shape)), DTYPES[dtype]) for name, dtype, shape in header["tensors"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"the description of a copy in memory is not understood: {error}") from error


def regions_of(header: JsonObject) -> list[BlobRegion]:
    """The regions that a header lists. Raises DamagedError where it is not one."""
    try:
        names = [entry[0] for entry in header["tensors"]]
        return [
            BlobRegion(names[number], Region(tuple(map(int, offsets)), tuple(map(int, sizes))), int(position))
            for number, offsets, sizes, position in header["parts"]
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DamagedError(f"the description of a copy in memory is not understood: {error}") from error
