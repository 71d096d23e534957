"""The run file as typed dataclasses: every field has a type, a default and a docstring that is its help text.

`loader.py` reads YAML into these, `rules.py` checks what types cannot say. Sizes are counts, budgets are
tokens, times are seconds. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, functional_validators

from flm_megatron.config.numbers import dataclass

SETTINGS = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


@dataclass(config=SETTINGS)
class MupConfig:
    """Maximal-update parametrization: how initial weights and learning rates follow the width."""

    enabled: bool = False
    """Use muP. Off is the standard parametrization (multipliers still apply)."""
    base_hidden_size: int = 256
    """Width at which the hyperparameters were found; the width factor is m = hidden_size / base_hidden_size."""


@dataclass(config=SETTINGS)
class LoraConfig:
    """Low-rank adapters: the weights stay, and W + alpha / rank x B A is learnt in their place."""

    rank: int = 8
    """Rank of B A."""
    alpha: float = 16.0
    """Scale of B A, divided by the rank."""
    targets: list[Literal["qkv", "projection", "fc1", "fc2"]] = field(
        default_factory=lambda: ["qkv", "projection", "fc1", "fc2"]
    )
    """Matrices of every layer that have adapters."""


@dataclass(config=SETTINGS)
class ModelConfig:
    """Shape of a decoder. The defaults are Tele-FLM's block; FLM-101B's is `layernorm`, `gelu`, `bias`, `xpos`."""

    num_layers: int = 4
    """Number of transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 352
    """Width of the feed-forward layer (of each of gate and up with SwiGLU)."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads; none means one per query head (multi-head attention)."""
    head_dim: int | None = None
    """Channels per head; none means hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """True vocabulary, without padding; none means the tokenizer's."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before attention, before the feed-forward layer, and after the last layer."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward activation."""
    bias: bool = False
    """Biases in every linear layer but the language-model head."""
    position: Literal["rope", "xpos"] = "rope"
    """Rotary positions, or xPos (rotary with exponential decay)."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    xpos_scale_base: float = 512.0
    """xPos: tokens over which the decay exponent grows by one."""
    input_mult: float = 1.0
    """Multiplies the embedding output."""
    output_mult: float = 1.0
    """Multiplies the final hidden state before the head (divided by the width factor under muP)."""
    matrix_init_std: float = 0.02
    """Standard deviation of matrix weights at the base width (at this width without muP)."""
    vector_init_std: float = 0.02
    """Standard deviation of embedding weights."""
    mup: MupConfig = field(default_factory=MupConfig)
    """Maximal-update parametrization."""
    lora: LoraConfig | None = None
    """Fine-tuning: train adapters and nothing else; none trains the weights."""
    from_checkpoint: bool = False
    """Take the model from `checkpoint.initial`; `model: from_checkpoint` says the same. Adapters, muP and initial
    deviations may stand beside it, and what the checkpoint has too."""

    @property
    def kv_channels(self) -> int:
        """Channels per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def width_factor(self) -> float:
        """muP's m = hidden_size / base_hidden_size; 1 without muP."""
        return self.hidden_size / self.mup.base_hidden_size if self.mup.enabled else 1.0

    @property
    def logit_multiplier(self) -> float:
        """Factor on the final hidden state before the head: output_mult / m."""
        return self.output_mult / self.width_factor

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation == "swiglu"


def spelled_out(model: Any) -> Any:
    """`from_checkpoint` where a model is expected, as the field of a model that it stands for."""
    return {"from_checkpoint": True} if model == "from_checkpoint" else model


@dataclass(config=SETTINGS)
class ParallelConfig:
    """How one stage is spread over processes. Data parallel size is what is left of the world."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank; above 1 the interleaved schedule is used."""
    data: int | None = None
    """Data-parallel size; none means world size / (tensor x pipeline)."""
    sequence: bool = False
    """Split norms and residuals along the sequence within tensor groups."""
    context: int = 1
    """Context-parallel size (refused above 1 for now)."""
    expert: int = 1
    """Expert-parallel size (refused above 1 for now)."""
    pipeline_layers: list[int] | None = None
    """Layers of each pipeline part in the order of execution (pipeline x virtual_pipeline numbers);
    none splits as evenly as possible, the first parts taking what is over."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of parameters with the forward pass (needs the distributed optimizer)."""

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor * self.pipeline


@dataclass(config=SETTINGS)
class OptimizerConfig:
    """AdamW."""

    lr: float = 3e-4
    """Peak learning rate of embeddings, norms and biases, and of matrices unless `matrix_lr` is given."""
    matrix_lr: float | None = None
    """Peak learning rate of matrices at the base width (muP divides it by the width factor)."""
    min_lr: float = 3e-5
    """Learning rate at the end of the schedule, on the scale of `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(config=SETTINGS)
class ScheduleConfig:
    """Learning rate as a function of tokens."""

    kind: Literal["cosine", "linear", "wsd", "power", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from zero; a later stage that continues the schedule has none."""
    warmup_samples: int | None = None
    """The same in samples; give one of the two."""
    decay_tokens: int | None = None
    """Tokens from the start of the schedule to its end; none means the end of the stage, or of the last stage that
    continues the schedule."""
    wsd_decay_fraction: float = 0.1
    """wsd: last part of the schedule that decays linearly."""
    power_exponent: float = -0.51
    """power: learning rate is proportional to tokens to this power once below the peak."""
    power_start_tokens: int | None = None
    """power: tokens at which the power law leaves the peak; none means the end of the warm-up."""
    boundary: Literal["continue", "restart", "rewarm"] = "restart"
    """At the start of a later stage: `continue` the schedule of the run, `restart` at this stage, or
    `rewarm`: continue, after a linear warm-up from zero to the continued value. `lr` and `min_lr` are always the
    stage's own."""


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
    """Adam's step of new entries: the old one, or counted from their birth."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations; gradients are accumulated and masters kept in fp32."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Matrix products of the layers' linear layers in FP8, with one dynamic scale for each matrix or one for each of
    its rows (in bf16, on GPUs that have FP8); weights, and all else, stay as they are."""
    recompute: Literal["none", "selective", "full"] = "none"
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


@dataclass(config=SETTINGS)
class SourceConfig:
    """One indexed dataset."""

    path: str
    """Path prefix of the dataset (without .bin and .idx)."""
    name: str | None = None
    """Name in logs; none means the last part of the path."""
    weight: float | None = None
    """Share of the blend; give a weight to every source or to none."""
    epochs: float | None = None
    """Passes over the source in one run of the whole blend; give epochs to every source or to none."""


@dataclass(config=SETTINGS)
class MixConfig:
    """How often a stage of fine-tuning takes a source."""

    stage: str
    """Name of the stage."""
    source: str
    """Name of the source."""
    passes: float
    """Passes over the source in one epoch of the stage: 1 takes it once, 0.1 another tenth in every epoch, 0 never."""


@dataclass(config=SETTINGS)
class ChatConfig:
    """Fine-tuning: the sources of `data` are JSON lines of conversations, and a stage lasts for `epochs`."""

    template: str = "tele-flm"
    """`tele-flm` (<_system>, <_user>, <_bot>), or the file of a Jinja chat template."""
    packing: bool = True
    """Put several conversations into one sample, none of which sees another; else each has a padded one of its own."""
    epochs: int = 4
    """Epochs of each stage, in place of its `tokens`."""
    mix: list[MixConfig] = field(default_factory=list)
    """Passes by stage and source; a stage that is not named takes every source once in each epoch, in one that is, a
    source that is not named is not taken."""


@dataclass(config=SETTINGS)
class DataConfig:
    """Data of a run: one stream of samples for all stages."""

    sequence_length: int = 128
    """Tokens in a sample of every stage. It may change where a run goes on: what is left is then cut anew."""
    train: list[SourceConfig] = field(default_factory=list)
    """Training sources, blended."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Validation sources, each reported by name, the same text in every stage."""
    cache: str | None = None
    """Folder for sample indices; none keeps them beside the datasets."""
    chat: ChatConfig | None = None
    """Fine-tuning on conversations (`flm sft`); none trains on text."""


@dataclass(config=SETTINGS)
class MemoryConfig:
    """Copies of the state in the memory of hosts, under a launcher that starts ranks again."""

    interval_steps: int = 10
    """Steps between copies: at most so many are done again after the loss of a host."""
    budget_gib: float | None = None
    """Host memory that the copies of one host may take; none means nine tenths of what is free."""


@dataclass(config=SETTINGS)
class CheckpointConfig:
    """Saving."""

    interval_steps: int = 0
    """Steps between checkpoints; 0 saves only at the end of a stage."""
    keep_last: int = 2
    """Newest checkpoints of a stage that are kept; the last one of a finished stage always is."""
    keep_every_steps: int = 0
    """Also keep checkpoints at multiples of this; 0 keeps none."""
    asynchronous: bool = False
    """Write in the background from a copy, while training goes on."""
    memory: MemoryConfig | None = None
    """Also keep each rank's state in its host's memory and in that of a neighbour, to go on from there when a host or a
    rank is lost."""
    initial: str | None = None
    """Checkpoint (ours or a Hugging Face folder) whose weights the first stage starts from."""


@dataclass(config=SETTINGS)
class LoggingConfig:
    """Metrics."""

    interval_steps: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    layer_norms: bool = False
    """Also log the norms of weights and gradients of each layer."""


@dataclass(config=SETTINGS)
class DistributedConfig:
    """Processes."""

    processes: int | None = None
    """Processes `flm train` starts when a launcher did not; none means what the stage's layout needs."""
    timeout_s: int = 600
    """Seconds a collective may wait before the run fails with the rank's name."""


Implementation = Literal["auto", "te", "apex", "triton", "torch", "compile"]


@dataclass(config=SETTINGS)
class KernelsConfig:
    """Which implementation runs each fused operation: Transformer Engine's, Apex's, a Triton kernel, plain PyTorch, or
    PyTorch through torch.compile.

    `auto` takes the best that is there (on a CPU PyTorch); one that is named and not there is an error.
    """

    rms_norm: Implementation = "auto"
    """RMSNorm: apex, triton, torch or compile."""
    swiglu: Implementation = "auto"
    """SwiGLU on the fused gate and up projection: triton, torch or compile."""
    rotary: Implementation = "auto"
    """Rotary positions on the packed query, key and value: triton, torch or compile."""
    cross_entropy: Implementation = "auto"
    """Cross entropy over the split vocabulary: triton or torch."""
    adamw: Implementation = "auto"
    """Optimizer update: te, apex, torch or triton."""
    grad_clip: Implementation = "auto"
    """Gradient norm and clipping: te, apex, torch or triton."""
    fp8_cast: Implementation = "auto"
    """Casts of matrices to FP8: triton or torch."""
    weight_gradient: Implementation = "auto"
    """Weight gradients added to their fp32 buffers by the product that computes them: apex or torch."""
    head_and_loss: Literal["auto", "fused", "separate"] = "auto"
    """`fused` keeps the logits of some tokens at a time and computes their gradient at once, `separate` keeps the
    logits of a whole micro-batch until the backward pass; auto is fused where the logits are large. (A z-loss needs
    them all.)"""


@dataclass(config=SETTINGS)
class RunConfig:
    """A whole run."""

    name: str = "run"
    """Name of the run, in logs and plots."""
    output: str = "runs/run"
    """Folder for checkpoints, metrics and plots."""
    seed: int = 1234
    """Seed of initial weights, of new weights at growth and of the order of samples."""
    tokenizer: str | None = None
    """SentencePiece model file."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    stages: list[StageConfig] = field(default_factory=list)
    """Stages in order."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Implementation of each fused operation."""
