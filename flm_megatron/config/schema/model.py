"""The model of a stage: its shape, its multipliers, and adapters."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS
from flm_megatron.json_text import Json


@dataclass(config=SETTINGS)
class MupConfig:
    """Maximal-update parametrization: how initial weights and learning rates follow the width."""

    enabled: bool = False
    """Use muP. Off is the standard parametrization (multipliers still apply)."""
    base_hidden_size: int = 256
    """Width at which the hyperparameters were found; the width factor is m = hidden_size / base_hidden_size."""


@dataclass(config=SETTINGS)
class LoraConfig:
    """Low-rank adapters: the weights are frozen, and W + alpha / rank x B A is learnt in their place."""

    rank: int = 8
    """Rank of B A."""
    alpha: float = 16.0
    """Scale of B A, divided by the rank."""
    targets: list[Literal["qkv", "projection", "fc1", "fc2"]] = field(
        default_factory=lambda: ["qkv", "projection", "fc1", "fc2"]
    )
    """Matrices of every layer that have adapters."""


@dataclass(config=SETTINGS)
class RopeScaling:
    """Rotary frequencies slowed down by a factor, so that a model reaches beyond the lengths it was trained with."""

    kind: Literal["linear", "llama3", "yarn"] = "llama3"
    """`linear` divides every frequency by the factor; `llama3` and `yarn` leave those that turn often within the
    original length, divide those that hardly turn, and go from one to the other in between; `yarn` also sharpens the
    attention."""
    factor: float = 8.0
    """How much slower the frequencies are, 1 or more."""
    original_length: int = 8192
    """llama3, yarn: tokens of a sequence that the unscaled model was trained with."""
    low_freq_factor: float = 1.0
    """llama3: frequencies of at most as many turns within the original length are divided."""
    high_freq_factor: float = 4.0
    """llama3: frequencies of at least as many turns within the original length stay."""
    beta_slow: float = 1.0
    """yarn: frequencies of about as many turns within the original length, or fewer, are divided."""
    beta_fast: float = 32.0
    """yarn: frequencies of about as many turns within the original length, or more, stay."""
    attention_factor: float | None = None
    """yarn: factor on rotated queries and on rotated keys; none means 0.1 ln(factor) + 1."""

    @property
    def constants(self) -> dict[str, float | None]:
        """The fields that this kind of scaling computes with, besides the kind, by their names."""
        others = {
            "linear": (),
            "llama3": ("original_length", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_length", "beta_slow", "beta_fast", "attention_factor"),
        }
        return {name: getattr(self, name) for name in ("factor", *others[self.kind])}

    @property
    def score_factor(self) -> float:
        """Factor on the scores of attention."""
        if self.kind != "yarn":
            return 1.0
        return (0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor) ** 2


@dataclass(config=SETTINGS)
class ModelConfig:
    """Shape of a decoder. The defaults are Tele-FLM's block; FLM-101B's is `layernorm`, `gelu`, `bias`, `xpos`."""

    num_layers: int = 4
    """Number of transformer layers; 0 leaves embedding, final norm and head."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 352
    """Width of the feed-forward layer (of each of gate and up where it is gated)."""
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
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward activation: gated (SwiGLU, or GeGLU with the tanh form of GELU, as Gemma's), or GELU, exact or in
    its tanh form, as GPT-2's."""
    bias: bool = False
    """Biases in every linear layer but the language-model head."""
    qkv_bias: bool = False
    """Biases in the query-key-value matrix alone, as Qwen 2 has them."""
    query_key_norm: bool = False
    """RMSNorm of each query and key over the channels of its head, before rotary positions, as Qwen 3 has it; all
    heads of a layer share the weights."""
    query_key_norm_epsilon: float | None = None
    """Added to the mean square in these norms; none means norm_epsilon. Growth changes the other alone."""
    parallel_residual: bool = False
    """Attention and feed-forward layer both read the layer's input, each through its own norm, and both are added to
    it, as GPT-NeoX has them; else the feed-forward layer reads the sum after attention."""
    position: Literal["rope", "xpos", "learned"] = "rope"
    """Rotary positions, xPos (rotary with exponential decay), or a learned vector for each, added to the embedding."""
    max_positions: int | None = None
    """Learned positions: how many there are, which is the longest sequence."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of a head's channels that turn, the first ones, rounded down; the others have no position (GPT-NeoX)."""
    rope_scaling: RopeScaling | None = None
    """Slower rotary frequencies for longer sequences, as Llama 3 has them; none leaves them as they are."""
    xpos_scale_base: float = 512.0
    """xPos: tokens over which the decay exponent grows by one."""
    sliding_window: int | None = None
    """Positions that attention sees, the token itself and those before it, as Mistral's; none means all."""
    tie_embeddings: bool = False
    """The head is the embedding: one matrix, whose copies at both ends of a pipeline stay equal."""
    input_mult: float = 1.0
    """Multiplies the embedding output."""
    output_mult: float = 1.0
    """Multiplies the final hidden state before the head (divided by the width factor under muP)."""
    matrix_init_std: float = 0.02
    """Standard deviation of matrix weights at the base width (at this width without muP)."""
    vector_init_std: float = 0.02
    """Standard deviation of embedding weights, at any width."""
    head_init_std: float | None = None
    """Standard deviation of the head's weights, at any width; none means `vector_init_std`."""
    mup: MupConfig = field(default_factory=MupConfig)
    """Maximal-update parametrization."""
    lora: LoraConfig | None = None
    """Fine-tuning: train adapters and nothing else; none trains the weights."""
    from_checkpoint: bool = False
    """Take the model from `checkpoint.initial`; `model: from_checkpoint` is short for it. Adapters, muP and initial
    deviations may be given beside it, and fields that equal the checkpoint's."""

    @property
    def kv_channels(self) -> int:
        """Channels per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.position != "learned"

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_key_epsilon(self) -> float:
        """Added to the mean square in the norms of queries and keys."""
        return self.norm_epsilon if self.query_key_norm_epsilon is None else self.query_key_norm_epsilon

    @property
    def width_factor(self) -> float:
        """muP's m = hidden_size / base_hidden_size; 1 without muP."""
        return self.hidden_size / self.mup.base_hidden_size if self.mup.enabled else 1.0

    @property
    def logit_multiplier(self) -> float:
        """Factor on the final hidden state before the head: output_mult / m."""
        return self.output_mult / self.width_factor

    @property
    def head_std(self) -> float:
        """Standard deviation of the head's initial weights, where it is not the embedding."""
        return self.vector_init_std if self.head_init_std is None else self.head_init_std

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("swiglu", "geglu")


def spelled_out(model: Json) -> Json:
    """`from_checkpoint` where a model is expected, as the field of a model that it stands for."""
    return {"from_checkpoint": True} if model == "from_checkpoint" else model
