"""One stage of a run: what is trained, for how long, how it grows out of the one before, and how it is watched."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import functional_validators

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.hardware import ParallelConfig
from flm_megatron.config.schema.model import ModelConfig, spelled_out
from flm_megatron.config.schema.optimizer import OptimizerConfig, ScheduleConfig
from flm_megatron.config.schema.settings import SETTINGS

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]


@dataclass(config=SETTINGS)
class ValidationConfig:
    """Loss on held-out text."""

    interval_steps: int = 0
    """Steps between validations; 0 validates only at the end of the stage."""
    samples: int = 0
    """Samples of each validation set to use; 0 does not validate."""


@dataclass(config=SETTINGS)
class GrowthConfig:
    """How a stage grows from the one before."""

    hidden: Literal["mask", "zero"] = "mask"
    """Operator for the hidden size."""
    ffn: Literal["mask", "zero"] = "mask"
    """Operator for the feed-forward size."""
    heads: Literal["mask", "zero"] = "mask"
    """Operator for attention heads and query groups."""
    layers: Literal["mask", "zero", "copy"] = "mask"
    """Operator for layers; `copy` is G_stack's plain copy, which does not preserve the function."""
    mask_steps: int | None = None
    """Steps over which masks open from 0 to 1; none means a fifth of the stage's."""
    mask_shape: Literal["linear", "cosine"] = "linear"
    """How masks open."""
    layer_selection: Literal["distance", "interleave", "top", "stack", "list"] = "distance"
    """Which layers are copied."""
    copied_layers: list[int] | None = None
    """For `list`: old layer indices, each copied once per mention, beside its source."""
    distance_samples: int = 8
    """For `distance`: validation samples over which the input-output distance is measured."""
    distance_metric: Literal["cosine", "l2"] = "cosine"
    """For `distance`: cosine or relative L2."""
    optimizer_step: Literal["keep", "birth"] = "keep"
    """Steps in Adam's bias correction of new entries: `keep` counts all, `birth` only those since the growth."""
    loss_tolerance: float | None = None
    """Largest relative change of the loss at the boundary; none means 1e-3 in bf16 and 1e-5 in fp32."""
    certify_samples: int = 4
    """Validation samples on which the growth is certified; 0 does not certify."""


@dataclass(config=SETTINGS)
class StabilityConfig:
    """What is done about a step whose loss or gradient norm is not finite or far above the steps before it."""

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """Such a step is never applied. `skip` leaves its samples out; `rollback` goes back to the weights and the
    optimizer of the last checkpoint too, leaving out all samples since; `stop` ends the run."""
    sigmas: float = 6.0
    """Standard deviations above the mean of the window from which on a loss, or the logarithm of a gradient norm, is
    an outlier; 0 looks for values that are not finite only."""
    window_steps: int = 128
    """Applied steps whose loss and gradient norm are remembered; outliers are looked for once half as many are."""
    max_in_a_row: int = 3
    """Steps in a row that may be refused; the last of them ends the run."""
    new_level_steps: int = 3
    """Outliers in a row (`max_in_a_row` if that is less) that, where they agree with each other, are no spike but a new
    level: the last of them is applied. Less than 2 never takes one; `stop` neither."""
    checksum_interval_steps: int = 0
    """Steps between comparisons of replicated weights over all ranks, which find silent corruption; they are compared
    before each checkpoint is written too; 0 never does."""
    embedding_gradient_shrink: float = 1.0
    """Factor on the gradient of the embedding (GLM-130B: 0.1); 1 leaves it as it is."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in what is minimised (PaLM: 1e-4); the loss that is
    reported is without it."""


@dataclass(config=SETTINGS)
class StageConfig:
    """One stage: a model, a layout, a budget, and how it comes out of the stage before."""

    name: str = "stage"
    """Name of the stage, unique in the run; its checkpoints lie under it."""
    model: Annotated[ModelConfig, functional_validators.BeforeValidator(spelled_out)] = field(
        default_factory=ModelConfig
    )
    """The model: its fields, or `from_checkpoint`, which takes those of `checkpoint.initial`."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel layout."""
    micro_batch: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch: int = 8
    """Samples in one step over all ranks."""
    tokens: int = 0
    """Token budget, rounded up to whole steps."""
    precision: Precision = "fp32"
    """Precision of weights and activations; gradients are accumulated and masters kept in fp32."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Matrix products of the layers' linear layers in FP8, with one dynamic scale for each matrix or one for each of
    its rows (in bf16, on GPUs that have FP8); weights, and all else, stay as they are."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass: none, norms and feed-forward layers, or whole layers."""
    transformer_engine: bool = False
    """Build layers from Transformer Engine's modules; it has to be installed, and there is no xPos in them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """Steps that go wrong."""
    trainable: Literal["all", "half"] = "all"
    """Which weights learn: all, or half of them, the others frozen: for every kind of matrix and norm half of the
    layers, chosen by seed, and one of embedding and head (half fine-tuning, arXiv 2404.18466)."""
    trainable_seed: int = 0
    """Seed of that choice."""
    growth: GrowthConfig | None = None
    """Growth out of the stage before; none on the first stage."""
