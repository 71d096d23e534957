"""How much each unit of a model matters, and the file that keeps it: safetensors with its description in JSON."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError
from safetensors import torch as safetensors

from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in
from flm_megatron.config.same_model import differences
from flm_megatron.config.schema import ModelConfig
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import DamagedError, RequestError, one_line
from flm_megatron.json_text import parse_json
from flm_megatron.model.limits import check_limits

VERSION = 1
KEY = "flm_importance"
"""Key of the description in the file's metadata."""
Dimension = Literal["hidden", "ffn", "heads", "layers"]
Criterion = Literal["activation", "gradient", "influence"]


@dataclass(frozen=True, eq=False)
class Importance:
    """How much the units of `model` matter, in float64 on the CPU: the higher, the more.

    `hidden` [d] has a number for each hidden channel, `ffn` [layers, f] for each feed-forward unit, `heads`
    [layers, H] for each query head, `layers` [layers] for each layer; `criteria` says by which criterion each was
    measured. `energy` [2 layers + 1, d] is the mean square of each channel of the residual stream where the norms read
    it (the two of layer 0, those of layer 1, ..., the final one): under LayerNorm of what is left without its mean over
    the channels. All are means or sums over `tokens` tokens in `samples` samples; `source_hash` is the logical hash of
    the checkpoint that was measured, if it has one.
    """

    model: ModelConfig
    hidden: torch.Tensor
    ffn: torch.Tensor
    heads: torch.Tensor
    layers: torch.Tensor
    energy: torch.Tensor
    criteria: Mapping[Dimension, Criterion]
    samples: int
    tokens: int
    source_hash: str | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in tensor_shapes(self.model)}

    def save(self, path: Path) -> None:
        """Write the file `path`, whole or not at all; its folder is made if need be. Raises RequestError if it cannot
        be written."""
        tensors = {name: values.contiguous() for name, values in self.tensors.items()}
        description = {
            "version": VERSION,
            "model": asdict(self.model),
            "criteria": dict(self.criteria),
            "samples": self.samples,
            "tokens": self.tokens,
            "source_hash": self.source_hash,
            "crc32": _checksum(tensors),
        }
        try:
            make_folders(path.parent)
            replace_file(path, safetensors.save(tensors, {KEY: json.dumps(description)}))
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


@checked_dataclass(config=ConfigDict(extra="ignore"))
class _Description:
    """The description in a file."""

    version: int
    model: ModelConfig
    criteria: dict[Dimension, Criterion]
    samples: int
    tokens: int
    crc32: int
    source_hash: str | None = None


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an importance of `model`."""
    layers, hidden = model.num_layers, model.hidden_size
    return {
        "hidden": (hidden,),
        "ffn": (layers, model.ffn_hidden_size),
        "heads": (layers, model.num_attention_heads),
        "layers": (layers,),
        "energy": (2 * layers + 1, hidden),
    }


def read_importance(path: Path) -> Importance:
    """The importance in a file of `Importance.save`.

    Raises:
        RequestError: there is no such file, or it is not one of importance, or of a later version.
        DamagedError: it is not whole, or holds other tensors than it says.
    """
    if not path.is_file():
        raise RequestError(f"{path}: there is no such file: write it with `flm importance`")
    names = arrays_in(path)  # which refuses what is not a whole file
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: cannot be read: {error}") from None
    if text is None:
        raise RequestError(f"{path} holds no importance of units: write it with `flm importance`")
    described = _description(path, text)
    _check_tensors(path, described, tensors)
    known = {name: getattr(described, name) for name in ("model", "criteria", "samples", "tokens", "source_hash")}
    return Importance(**known, **tensors)


def check_importance(importance: Importance, model: ModelConfig, where: str) -> None:
    """Check that an importance was measured on `model`; `where` names it in errors.

    Raises:
        RequestError: it is another model's; the message says what differs.
    """
    if found := differences(model, importance.model, ("the checkpoint", "the file")):
        raise RequestError(f"{where} is of another model: {'; '.join(found)}: measure it with `flm importance`")


def _description(path: Path, text: str) -> _Description:
    values = parse_json(text, str(path), DamagedError)
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise RequestError(f"{path} is of version {version}, this program reads up to {VERSION}: update it")
    try:
        described = TypeAdapter(_Description).validate_python(values)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, mistake["loc"]))
        raise RequestError(
            f"{path}: is no importance that this program knows ({name:.200}: {mistake['msg']:.200}): update it, or "
            "measure again"
        ) from None
    check_limits(described.model, str(path))
    return described


def _check_tensors(path: Path, described: _Description, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise DamagedError unless the tensors are those of the description, whole and finite."""
    shapes = tensor_shapes(described.model)
    if tensors.keys() != shapes.keys():
        found = one_line(", ".join(sorted(tensors)))
        raise DamagedError(f"{path}: has the tensors {found:.200}, an importance has {', '.join(sorted(shapes))}")
    for name, shape in shapes.items():
        values = tensors[name]
        if tuple(values.shape) != shape or values.dtype != torch.float64:
            raise DamagedError(f"{path}: {name} is {values.dtype} {tuple(values.shape)}, not torch.float64 {shape}")
    if _checksum(tensors) != described.crc32:
        raise DamagedError(f"{path}: the checksum does not fit its numbers: the file was changed")
    if bad := [name for name, values in tensors.items() if not values.isfinite().all()]:
        raise DamagedError(f"{path}: {bad[0]} has numbers that are not finite")
    if (energy := tensors["energy"]).lt(0).any() or not energy.sum().isfinite():
        raise DamagedError(f"{path}: energy has numbers that are no mean squares: below 0, or without a finite sum")


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of all numbers, tensor by tensor in the order of their names."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), found)
    return found
