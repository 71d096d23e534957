"""The plan of a shrinking: one value, stored in checkpoints, that determines all tensors of the smaller model."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from flm_megatron.config.schema import ModelConfig
from flm_megatron.growth.change import Change, ShapeChange, changed_model
from flm_megatron.json_text import JsonObject

if TYPE_CHECKING:
    from flm_megatron.growth.shrink.importance import Criterion, Dimension

VERSION = 1


@dataclass(frozen=True)
class Kept:
    """Which of `size` units are kept in each of `rows` layers (one row where it is one set for the model): a bit for
    each, row by row, every row a whole number of bytes."""

    rows: int
    size: int
    bits: bytes

    @classmethod
    def of(cls, kept: np.ndarray) -> Kept:
        """From booleans [rows, size]."""
        rows, size = kept.shape
        return cls(rows, size, np.packbits(kept, axis=1).tobytes())

    def indices(self, row: int) -> np.ndarray:
        """The kept units of a row in their old order."""
        width = -(-self.size // 8)
        packed = np.frombuffer(self.bits, np.uint8, width, row * width) if self.size else np.zeros(0, np.uint8)
        return np.flatnonzero(np.unpackbits(packed, count=self.size))

    def to_json(self) -> str:
        """Text for a manifest: the bits, compressed."""
        return base64.b64encode(zlib.compress(self.bits, 9)).decode()

    @classmethod
    def from_json(cls, text: str, rows: int, size: int) -> Kept:
        """From `to_json`'s text. Raises ValueError unless it has as many bits as `rows` and `size` say."""
        try:
            expand, length = zlib.decompressobj(), max(rows, 0) * -(-size // 8)
            bits = expand.decompress(base64.b64decode(text, validate=True), length + 1)
        except zlib.error as error:
            raise ValueError(f"kept units cannot be read: {error}") from None
        if len(bits) != length:
            raise ValueError(f"kept units are not {length} bytes")
        return cls(rows, size, bits)


@dataclass(frozen=True)
class ShrinkPlan(ShapeChange):
    """Old and new model, and which units of the old one the new one keeps, in their old order.

    `layers` and `hidden` are one set for the model; `ffn` (feed-forward units) and `heads` (query heads, of which each
    kept query group has equally many) have a row for each layer that is kept. `norm_scales` are factors on the weights
    of the norms, two for each kept layer and the final one's; none where they stay. `criteria` say by what each
    dimension was chosen, `importance_of` is the logical hash of the checkpoint that was measured.
    """

    CHANGE: ClassVar[Change] = "shrinking"

    hidden: Kept
    ffn: Kept
    heads: Kept
    layers: Kept
    criteria: Mapping[Dimension, Criterion]
    rescale_norms: bool = True
    norm_scales: tuple[float, ...] = ()
    importance_of: str | None = None

    def norm_scale(self, norm: int) -> float:
        """Factor on the weights of a norm, counted as in `norm_scales`."""
        return self.norm_scales[norm] if self.norm_scales else 1.0

    def kept(self) -> dict[str, Kept]:
        """The kept units of each dimension."""
        return {"hidden": self.hidden, "ffn": self.ffn, "heads": self.heads, "layers": self.layers}

    def to_json(self) -> dict[str, object]:
        """Plain data, for a checkpoint's manifest."""
        return {
            "change": self.CHANGE,
            "version": VERSION,
            "stage": self.stage,
            "old": asdict(self.old),
            "new": asdict(self.new),
            **{name: kept.to_json() for name, kept in self.kept().items()},
            "criteria": dict(self.criteria),
            "rescale_norms": self.rescale_norms,
            "norm_scales": list(self.norm_scales),
            "importance_of": self.importance_of,
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> ShrinkPlan:
        """The plan from `to_json`'s result. Raises KeyError, TypeError or ValueError if it is none that is known."""
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}")
        old, new = ModelConfig(**data["old"]), ModelConfig(**data["new"])
        kept = {name: Kept.from_json(data[name], *shape) for name, shape in kept_rows(old, new).items()}
        plain = {name: data[name] for name in ("stage", "criteria", "rescale_norms", "importance_of")}
        values: JsonObject = {**plain, **kept, "norm_scales": tuple(data["norm_scales"])}
        return cls(old=old, new=new, **values)


def kept_rows(old: ModelConfig, new: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and size of the kept units of each dimension."""
    layers = new.num_layers
    return {
        "hidden": (1, old.hidden_size),
        "ffn": (layers, old.ffn_hidden_size),
        "heads": (layers, old.num_attention_heads),
        "layers": (1, old.num_layers),
    }


def shrunk_model(old: ModelConfig, new: ModelConfig, norm_scales: tuple[float, ...]) -> ModelConfig:
    """`new` with the old vocabulary and an epsilon that fits the mean squares of the kept channels: over the norms the
    mean of their factors' squares, which in a model that was grown by `zero` are all alike."""
    squares = [scale * scale for scale in norm_scales]
    return changed_model(old, new, sum(squares) / len(squares) if squares else 1.0)
