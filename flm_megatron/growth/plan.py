"""The plan of a growth: one value, stored in checkpoints, that determines all grown tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import ClassVar, Literal

from flm_megatron.config.budget import stage_steps
from flm_megatron.config.schema import GrowthConfig, ModelConfig, StageConfig
from flm_megatron.growth.change import Change, ShapeChange, changed_model
from flm_megatron.growth.layers import LayerSource, select_layers
from flm_megatron.growth.opening import MaskShape, OpeningMasks
from flm_megatron.growth.rules import check_growth, grown_dimensions
from flm_megatron.json_text import JsonObject
from flm_megatron.model.mask_plan import MaskedPaths

Operator = Literal["mask", "zero", "clone"]
OptimizerState = Literal["keep", "reset_new", "reset_all", "grow"]
MASKED_SHARE = 5
"""Masks open over the first 1 / MASKED_SHARE of a stage."""


@dataclass(frozen=True)
class TrainedScale:
    """Root mean squares of trained weights and means of their second moments: per tensor one number for each old layer
    (one in all where it has no layers). Only tensors that were measured are there."""

    rms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    exp_avg_sq: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def rms_of(self, name: str, layer: int | None) -> float:
        """Of an old layer; of all together without one."""
        values = self.rms[name]
        return math.sqrt(fmean(v * v for v in values)) if layer is None else values[layer]

    def exp_avg_sq_of(self, name: str, layer: int | None) -> float:
        """Of an old layer; of all together without one; 0 where nothing was measured, as there were no moments."""
        values = self.exp_avg_sq.get(name)
        if values is None:
            return 0.0
        return fmean(values) if layer is None else values[layer]


@dataclass(frozen=True)
class GrowthPlan(ShapeChange):
    """Old and new model, an operator per dimension, and the source of every layer.

    `new` is the model that the grown stage trains: as configured, but for changes that preserve the function. New
    values are drawn from `seed` and `stage` (the grown stage's name), so two growths of one run never draw the same
    numbers. Plans of commits that masked a path at each of its modules do not name `masked_paths`. `earlier_masks` are
    those of growths before, of other dimensions, that were not open when this one came.
    """

    CHANGE: ClassVar[Change] = "growth"

    hidden: Operator
    ffn: Operator
    heads: Operator
    layers: Literal["mask", "zero", "copy", "random"]
    layer_sources: tuple[LayerSource, ...]
    seed: int
    optimizer_step: Literal["keep", "birth"] = "keep"
    mask_steps: int = 0
    mask_shape: MaskShape = "linear"
    masked_paths: MaskedPaths = "each"
    earlier_masks: tuple[OpeningMasks, ...] = ()
    rejuvenate: float = 1.0
    clone_noise: float = 0.0
    shrink: float | None = None
    optimizer_state: OptimizerState = "reset_new"
    new_scale: Literal["init", "trained"] = "init"
    trained: TrainedScale = field(default_factory=TrainedScale)

    @property
    def norm_scale(self) -> float:
        """Factor on old norm weights: sqrt(d_old / d_new) under `zero`, as the mean square is over more channels."""
        return math.sqrt(self.old.hidden_size / self.new.hidden_size) if self.hidden == "zero" else 1.0

    @property
    def final_norm_scale(self) -> float:
        """Factor on the final norm's old values. A tied head is scaled as the embedding is, and cloned without being
        shared out among the copies: the norm that it reads makes up for both."""
        if not self.new.tie_embeddings:
            return 1.0
        copies = self.new.hidden_size // self.old.hidden_size if self.hidden == "clone" else 1
        return self.head_scale / (self.embedding_scale * copies)

    @property
    def grows(self) -> tuple[str, ...]:
        """Dimensions that grow, of hidden, ffn, heads, layers."""
        return grown_dimensions(self.old, self.new)

    @property
    def masked(self) -> tuple[str, ...]:
        """Those of them that grow behind a mask."""
        return tuple(name for name in self.grows if self.shrink is None and getattr(self, name) == "mask")

    @property
    def preserving(self) -> bool:
        """Whether the grown model computes the old function at its first step."""
        changed_depth = self.layers in ("copy", "random") and self.old.num_layers != self.new.num_layers
        return self.shrink is None and not changed_depth

    def keeps_moments(self, copy: bool) -> bool:
        """Whether old entries (with `copy`, copies of them) go on with moments and with their place in Adam's count."""
        return self.optimizer_state in ("keep", "grow") or (self.optimizer_state == "reset_new" and not copy)

    @property
    def looks_at_trained(self) -> bool:
        """Whether new entries depend on the trained ones beside them, and so on their layer."""
        return self.new_scale == "trained" or self.optimizer_state == "grow"

    def to_json(self) -> dict[str, object]:
        """Plain data, for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: JsonObject) -> GrowthPlan:
        """The plan from `to_json`'s result."""
        values = dict(data)
        values["old"], values["new"] = ModelConfig(**values["old"]), ModelConfig(**values["new"])
        values["layer_sources"] = tuple(LayerSource(**source) for source in values["layer_sources"])
        values["earlier_masks"] = tuple(map(OpeningMasks.from_json, values.get("earlier_masks", ())))
        by_kind = values.get("trained", {}).items()
        values["trained"] = TrainedScale(**{kind: {n: tuple(v) for n, v in each.items()} for kind, each in by_kind})
        return cls(**values)


def stage_growth(stage: StageConfig, sequence_length: int) -> GrowthConfig:
    """The stage's growth settings with `mask_steps` filled in."""
    growth = stage.growth or GrowthConfig()
    if growth.mask_steps is not None:
        return growth
    return replace(growth, mask_steps=max(1, stage_steps(stage, sequence_length) // MASKED_SHARE))


def make_plan(
    old: ModelConfig,
    new: ModelConfig,
    growth: GrowthConfig,
    seed: int,
    distances: Sequence[float] | None = None,
    stage: str = "grown",
    trained: TrainedScale | None = None,
) -> GrowthPlan:
    """Plan the growth of `old`, the model as it was trained, into the configured `new`.

    `mask_steps` of `growth` must be set (see `stage_growth`). `distances` has one number per old layer and is needed
    only if layers are selected by distance; `trained` only to read new entries that start beside trained ones.

    Raises:
        RequestError: the growth is not possible as asked.
    """
    check_growth(old, new, growth)
    assert growth.mask_steps is not None, "the length of masks is the stage's: see stage_growth"
    return GrowthPlan(
        stage=stage,
        old=old,
        new=_effective(old, new, growth),
        hidden=growth.hidden,
        ffn=growth.ffn,
        heads=growth.heads,
        layers=growth.layers,
        layer_sources=select_layers(old.num_layers, new.num_layers, growth, distances),
        seed=seed,
        optimizer_step=growth.optimizer_step,
        mask_steps=growth.mask_steps,
        mask_shape=growth.mask_shape,
        masked_paths="once",
        rejuvenate=1.0 if growth.rejuvenate is None else growth.rejuvenate,
        clone_noise=growth.clone_noise,
        shrink=growth.shrink,
        optimizer_state=growth.optimizer_state,
        new_scale=growth.new_scale,
        trained=trained or TrainedScale(),
    )


def _effective(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> ModelConfig:
    """`new` with the epsilon that preserves the function.

    Under `zero` on the hidden size, norm_epsilon is d_old / d_new of the old one: the mean square falls by that factor
    when zero channels are added. `rejuvenate` scales all of the residual stream, and so its mean square by the factor's
    square.
    """
    ratio = old.hidden_size / new.hidden_size if growth.hidden == "zero" else 1.0
    return changed_model(old, new, ratio * (growth.rejuvenate or 1.0) ** 2)
