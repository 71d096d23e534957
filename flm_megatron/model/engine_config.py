"""megatron-core's configuration of one stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.schema import LoraConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine.transformer import TransformerConfig, without_cuda_graphs
from flm_megatron.kernels import fp8
from flm_megatron.kernels.choice import require_transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": gelu_tanh,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}
"""The function of the gate, or of all of the first matrix's output where there is none."""


@dataclass
class EngineConfig(TransformerConfig):
    """megatron-core's configuration, with the fields that our own modules read."""

    recompute_norms_and_mlp: bool = False
    """Compute the norms and the feed-forward layers again in the backward pass (`recompute: selective`).
    The engine's own selective recomputation of norms needs Transformer Engine."""
    transformer_engine: bool = False
    """Build layers from Transformer Engine's modules."""
    xpos_scale_base: float | None = None
    """xPos: tokens over which the decay exponent grows by one; none for plain rotary positions."""
    sliding_window: int | None = None
    """Positions that attention sees, itself among them; none for all. (The engine's own `window_size` is Transformer
    Engine's.)"""
    parallel_residual: bool = False
    """Attention and feed-forward layer both read the layer's input."""
    query_key_epsilon: float = 1e-5
    """Added to the mean square in the norms of queries and keys (`qk_layernorm`)."""
    embedding_gradient_shrink: float = 1.0
    """Factor on the gradient of the embedding."""
    z_loss: float = 0.0
    """Weight of the z-loss in training."""
    distill_temperature: float = 1.0
    """Divides logits in the divergence from a teacher's."""
    lora: LoraConfig | None = None
    """Adapters of the linear layers."""
    fp8_scaling: fp8.Scaling | None = None
    """Scaling of FP8 products in the linear layers; none computes them in `params_dtype`. (The engine's own `fp8` is
    Transformer Engine's.)"""


def transformer_config(stage: StageConfig) -> EngineConfig:
    """megatron-core's configuration of `stage` for the current device.

    Weights are allocated but not initialised: they come from a checkpoint, under every layout alike.

    Raises:
        RequestError: the layers cannot be split over the pipeline as asked, or Transformer Engine or FP8 is asked
            for and not there.
    """
    require_transformer_engine(stage)
    fp8.require(stage)
    options = {
        **_shape(stage.model),
        "transformer_engine": stage.transformer_engine,
        # Transformer Engine's layers do this on their own; ours from the moment that they have buffers.
        "gradient_accumulation_fusion": stage.transformer_engine,
        **_layout(stage.model.num_layers, stage.parallel),
        **_precision(stage),
        **_recomputation(stage),
        "embedding_gradient_shrink": stage.stability.embedding_gradient_shrink,
        "z_loss": stage.stability.z_loss,
        "distill_temperature": stage.distill.temperature if stage.distill else 1.0,
        "lora": stage.model.lora,
        "fp8_scaling": None if stage.fp8 == "none" else stage.fp8,
        **current().engine_options(),
    }
    # The engine fuses bias and activation for SwiGLU exactly, but for exact GELU as its tanh form.
    options["bias_activation_fusion"] = options["bias_activation_fusion"] and stage.model.activation == "swiglu"
    build: Callable[..., EngineConfig] = EngineConfig  # the engine's fields have no types
    return build(**options)


def _shape(model: ModelConfig) -> dict[str, object]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.kv_channels,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.normalization],
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": model.gated,
        "activation_func": ACTIVATIONS[model.activation],
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.query_key_norm,
        "query_key_epsilon": model.query_key_epsilon,
        "parallel_residual": model.parallel_residual,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "output_layer_init_method": torch.nn.init.zeros_,  # not called; the engine's own divides by the layers
        "softmax_scale": _softmax_scale(model),
        **without_cuda_graphs(),
        "xpos_scale_base": model.xpos_scale_base if model.position == "xpos" else None,
        "sliding_window": model.sliding_window,
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
    }


def _softmax_scale(model: ModelConfig) -> float | None:
    """Factor on the scores of attention; none is 1 / sqrt(channels)."""
    factor = 1.0 if model.rope_scaling is None else model.rope_scaling.score_factor
    return None if factor == 1 else factor / math.sqrt(model.kv_channels)


def _layout(num_layers: int, parallel: ParallelConfig) -> dict[str, object]:
    chunks = [["decoder"] * count for count in pipeline_split(num_layers, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "pipeline_model_parallel_layout": chunks if parallel.pipeline > 1 else None,
        "sequence_parallel": parallel.sequence,
        # Only the interleaved schedule can overlap its transfers; it needs them one by one then.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _precision(stage: StageConfig) -> dict[str, object]:
    dtype = DTYPES[stage.precision]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": stage.precision == "bf16",
        # Gradients of the sum over tokens; the loop divides by the number of tokens of the whole batch.
        "calculate_per_token_loss": True,
    }


def _recomputation(stage: StageConfig) -> dict[str, object]:
    if stage.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if stage.recompute == "selective" and stage.transformer_engine:
        return {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    return {"recompute_norms_and_mlp": stage.recompute == "selective"}
