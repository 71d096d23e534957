"""One stage of a run: what is trained, for how long, how it grows or shrinks from the stage before, and how it is
watched."""

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

    hidden: Literal["mask", "zero", "clone"] = "mask"
    """Operator for the hidden size."""
    ffn: Literal["mask", "zero", "clone"] = "mask"
    """Operator for the feed-forward size."""
    heads: Literal["mask", "zero", "clone"] = "mask"
    """Operator for attention heads and query groups."""
    layers: Literal["mask", "zero", "copy", "random"] = "mask"
    """Operator for layers; `copy` (G_stack's plain copy) and `random` (new layers as in a fresh model) do not preserve
    the function."""
    clone_noise: float = 0.0
    """Noise on the outgoing weights of cloned units, as a share of a fresh model's standard deviation; it cancels over
    the copies of a unit."""
    mask_steps: int | None = None
    """Steps over which masks open from 0 to 1; none means a fifth of the stage."""
    mask_shape: Literal["linear", "cosine"] = "linear"
    """How masks open."""
    layer_selection: Literal["distance", "interleave", "top", "stack", "middle", "list"] | None = None
    """Which layers are copied, or where random ones go; none means `stack`."""
    copied_layers: list[int] | None = None
    """For `list`: old layer indices, each copied once per mention, beside its source."""
    distance_samples: int = 8
    """For `distance`: validation samples over which the input-output distance is measured."""
    distance_metric: Literal["cosine", "l2"] = "cosine"
    """For `distance`: cosine or relative L2 distance."""
    rejuvenate: float | None = None
    """Factor in (0, 1] on all old matrices, embedding and head, which norms undo: it changes no logit, and the old
    weights learn faster for their size."""
    shrink: float | None = None
    """Shrink and perturb: old matrices, embedding and head times this factor in (0, 1], plus a fresh initialisation of
    the new shape. (It makes values smaller; a smaller model is what the stage's own section `shrink` makes.) It does
    not preserve the function. It takes the place of `mask`, written out or by default, in every dimension: nothing is
    masked, and layers are copied (or `random`)."""
    new_scale: Literal["init", "trained"] = "init"
    """Standard deviation of new random entries: that of a fresh model, or the root mean square of the trained ones
    beside them, in the same tensor and layer."""
    optimizer_state: Literal["keep", "reset_new", "reset_all", "grow"] = "reset_new"
    """Adam's moments: `reset_new` keeps those of old entries, `keep` gives copies those of their sources too, `grow`
    gives all other new entries the mean second moment of the trained ones beside them as well. `reset_all` begins anew,
    with Adam's step at 0."""
    optimizer_step: Literal["keep", "birth"] = "keep"
    """Steps in Adam's bias correction of new entries: `keep` counts all, `birth` only those since the growth."""
    lr_mult: float = 1.0
    """Factor on the learning rate of all weights when the stage begins; it goes linearly to 1."""
    new_lr_mult: float = 1.0
    """A further factor on that of the entries that the growth added; it goes linearly to 1."""
    lr_mult_steps: int | None = None
    """Steps after which both factors are 1; none means `mask_steps`."""
    loss_tolerance: float | None = None
    """Largest relative change of the loss at the boundary; none means 1e-3 in bf16 and 1e-5 in fp32."""
    certify_samples: int = 4
    """Validation samples on which the growth is certified; 0 does not certify."""

    @property
    def selection(self) -> str:
        """How layers are selected."""
        return self.layer_selection or "stack"


@dataclass(config=SETTINGS)
class DistillConfig:
    """Learning from a teacher as well as from the text: the loss of a token is (1 - weight) cross entropy + weight
    temperature^2 KL(teacher || student). The loss that is reported stays the cross entropy."""

    teacher: str
    """Checkpoint of any format, or name of an earlier stage, whose last checkpoint it is. It has the same vocabulary,
    and does not learn."""
    temperature: float = 1.0
    """Divides the logits of both before the softmax of the divergence."""
    weight: float = 0.5
    """Share of the divergence in the loss, above 0 and at most 1."""
    parallel: ParallelConfig | None = None
    """The teacher's own layout over the stage's processes; none means the stage's, or the largest smaller one that the
    teacher fits."""
    precision: Precision | None = None
    """Precision of the teacher's weights and activations; none means the stage's."""


@dataclass(config=SETTINGS)
class ShrinkConfig:
    """How a stage's model is cut out of the larger one before: which units are kept, by how much they matter.

    (`growth.shrink` is another thing: shrink and perturb, which makes the values of a growing model smaller.)
    """

    hidden: Literal["activation", "gradient"] = "activation"
    """Which hidden channels matter: those of the largest mean absolute activation, or of the largest mean absolute
    product of activation and gradient."""
    ffn: Literal["activation", "gradient"] = "activation"
    """The same for feed-forward units, layer by layer."""
    heads: Literal["activation", "gradient"] = "activation"
    """The same for attention heads, layer by layer, by the norm of what a head gives. Query groups are kept or dropped
    as wholes, by the sum of their heads; heads within a group by their own."""
    layers: Literal["influence", "gradient"] = "influence"
    """Which layers matter: those that turn their input most (1 - cosine of input and output), or of the largest mean
    absolute product of what they add and its gradient."""
    importance: str | None = None
    """File written by `flm importance` on the checkpoint to shrink; none measures it at the boundary."""
    samples: int = 16
    """Validation samples on which importance is measured where no file is given."""
    rescale_norms: bool = True
    """Norm weights times the root of the share of the mean square that the kept channels hold, so that outputs of the
    norms stay as large as they were."""
    loss_tolerance: float | None = None
    """Largest relative change of the loss at the boundary; none only reports it, as shrinking changes the function."""
    certify_samples: int = 4
    """Validation samples on which the loss before and after is measured; 0 does not measure."""


@dataclass(config=SETTINGS)
class StabilityConfig:
    """What to do about a step whose loss or gradient norm is not finite or far above those before it."""

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """Such a step is never applied. `skip` skips its samples; `rollback` also goes back to weights and optimizer of the
    last checkpoint, skipping all samples since; `stop` ends the run."""
    sigmas: float = 6.0
    """Standard deviations above the window's mean from which on a loss, or the logarithm of a gradient norm, is an
    outlier; 0 refuses only values that are not finite."""
    window_steps: int = 128
    """Applied steps whose loss and gradient norm are remembered; outliers are detected once the window is half full."""
    max_in_a_row: int = 3
    """Steps in a row that may be refused; the last of them ends the run."""
    new_level_steps: int = 3
    """Outliers in a row (at most `max_in_a_row`) that are accepted as a new level if they agree with each other: the
    last of them is applied. Below 2, or with `stop`, there are no new levels."""
    checksum_interval_steps: int = 0
    """Steps between comparisons of replicated weights over all ranks, which detect silent corruption; they are also
    compared before each checkpoint; 0 never compares."""
    embedding_gradient_shrink: float = 1.0
    """Factor on the gradient of the embedding (GLM-130B: 0.1); 1 does not change it."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, added to the training loss (PaLM: 1e-4) but not to the
    reported one."""


@dataclass(config=SETTINGS)
class StageConfig:
    """One stage: a model, a layout, a budget, and how it grows or shrinks from the stage before."""

    name: str = "stage"
    """Name of the stage, unique in the run, and of its checkpoint folder."""
    model: Annotated[ModelConfig, functional_validators.BeforeValidator(spelled_out)] = field(
        default_factory=ModelConfig
    )
    """The model: its fields, or `from_checkpoint` to take the model of `checkpoint.initial`."""
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
    """Matrix products of the linear layers in FP8, with one dynamic scale per matrix or per row (in bf16, on GPUs with
    FP8); weights and everything else keep their precision."""
    recompute: Recompute = "none"
    """Activations that are recomputed in the backward pass: none, norms and feed-forward layers, or whole layers."""
    transformer_engine: bool = False
    """Build layers from Transformer Engine's modules, which must be installed; they have no xPos."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """What to do about bad steps."""
    trainable: Literal["all", "half"] = "all"
    """Which weights learn: all, or half (half fine-tuning, arXiv 2404.18466): for every kind of matrix and norm half of
    the layers, chosen by seed, and either embedding or head."""
    trainable_seed: int = 0
    """Seed of that choice."""
    growth: GrowthConfig | None = None
    """How the stage grows from the one before; none on the first stage."""
    distill: DistillConfig | None = None
    """Teacher that the stage learns from; none learns from the text alone."""
    shrink: ShrinkConfig | None = None
    """How the stage's model is cut out of the larger one before, in place of growth; none on the first stage."""
