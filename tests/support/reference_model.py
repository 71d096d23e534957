"""Tele-FLM in plain PyTorch, independent of megatron-core: what the model is compared with.

Driven by a table of logical tensors (names and shapes of `model.parameters`) in any floating dtype. Written for
reading, not for speed: one sequence of formulas, attention with its full matrix of scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flm_megatron.config.schema import ModelConfig
from flm_megatron.model.parameters import parameter_specs

LAYER = "decoder.layers."
ODD = ModelConfig(
    num_layers=3,
    hidden_size=108,
    ffn_hidden_size=75,
    num_attention_heads=18,
    num_query_groups=3,
    head_dim=8,
    vocab_size=331,
    norm_epsilon=1e-5,
    rope_theta=5000.0,
)
"""A small model whose sizes have little in common."""
IDS = (torch.arange(40).view(2, 20) * 7) % 331
"""Tokens for it."""


def random_tensors(model: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All logical tensors of `model`, drawn so that every part of the computation matters to the result.

    Values are drawn in float64, so two dtypes differ by rounding only.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in parameter_specs(model).values():
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        std = spec.init_std or 0.1
        tensors[spec.name] = (spec.init_mean + std * noise).to(dtype)
    return tensors


def reference_logits(model: ModelConfig, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [batch, sequence, true vocabulary] of `tokens` [batch, sequence], in the dtype of `tensors`."""
    hidden = tensors["embedding.word_embeddings.weight"][tokens]
    if model.position == "learned":
        hidden = hidden + tensors["embedding.position_embeddings.weight"][: tokens.size(1)]
    hidden = hidden * model.input_mult
    for index in range(model.num_layers):
        layer = {name.removeprefix(LAYER): x[index] for name, x in tensors.items() if name.startswith(LAYER)}
        normed = _norm(model, layer, "self_attention.linear_qkv.layer_norm_", hidden)
        attended = hidden + _attention(model, layer, normed)
        read = hidden if model.parallel_residual else attended
        hidden = attended + _feed_forward(model, layer, _norm(model, layer, "mlp.linear_fc1.layer_norm_", read))
    hidden = _norm(model, tensors, "decoder.final_layernorm.", hidden)
    factor = model.output_mult
    if model.mup.enabled:
        factor = factor / (model.hidden_size / model.mup.base_hidden_size)
    head = tensors["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"]
    return (hidden * factor) @ head.T


def reference_loss(model: ModelConfig, tensors: Mapping[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood [batch, sequence] of `labels` in nats."""
    logits = reference_logits(model, tensors, tokens)
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _norm(model: ModelConfig, tensors: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    if model.normalization == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + model.norm_epsilon)
        return scaled * tensors[prefix + "weight"] + tensors[prefix + "bias"]
    return _rms_norm(x, tensors[prefix + "weight"], model.norm_epsilon)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _linear(layer: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ layer[f"{name}.weight"].T
    return out + layer[f"{name}.bias"] if f"{name}.bias" in layer else out


def _attention(model: ModelConfig, layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    batch, sequence, _ = x.shape
    groups, channels = model.query_groups, model.kv_channels
    per_group = model.num_attention_heads // groups
    # The fused matrix is ordered by query group: its queries, then its key, then its value.
    qkv = _linear(layer, "self_attention.linear_qkv", x).view(batch, sequence, groups, per_group + 2, channels)
    query, key, value = qkv[..., :per_group, :], qkv[..., per_group : per_group + 1, :], qkv[..., per_group + 1 :, :]
    if model.query_key_norm:
        query = _rms_norm(query, layer["self_attention.q_layernorm.weight"], model.query_key_epsilon)
        key = _rms_norm(key, layer["self_attention.k_layernorm.weight"], model.query_key_epsilon)
    query, key = _positions(model, query, +1), _positions(model, key, -1)
    scores = torch.einsum("bigqc,bjgkc->bgqij", query, key) / math.sqrt(channels)
    future = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)
    if model.sliding_window:
        future |= torch.ones(sequence, sequence, dtype=torch.bool).tril(-model.sliding_window)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bgqij,bjgkc->bigqc", weights, value).reshape(batch, sequence, -1)
    return _linear(layer, "self_attention.linear_proj", mixed)


def _positions(model: ModelConfig, x: Tensor, xpos_sign: int) -> Tensor:
    """Rotate x [batch, sequence, group, head, channels] in pairs (i, i + turned/2), of the first `turned` channels;
    xPos also scales the pairs."""
    if model.position == "learned":
        return x
    sequence, channels = x.size(1), int(x.size(-1) * model.rotary_percent)
    position = torch.arange(sequence, dtype=torch.float64)[:, None]
    pair = torch.arange(channels // 2, dtype=torch.float64)
    angle = position * torch.tensor(_frequencies(model), dtype=torch.float64)
    scale = torch.full_like(angle, _stretch(model))
    if model.position == "xpos":
        zeta = (2 * pair / channels + 0.4) / 1.4
        scale = zeta ** (xpos_sign * position / model.xpos_scale_base)
    cos, sin = ((scale * f(angle)).to(x.dtype)[None, :, None, None, :] for f in (torch.cos, torch.sin))
    first, second = x[..., :channels].chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., channels:]], -1)


def _frequencies(model: ModelConfig) -> list[float]:
    """Radians a token by which each pair of channels turns: slow pairs slower by the factor of the scaling."""
    channels, scaling = int(model.kv_channels * model.rotary_percent), model.rope_scaling
    found = []
    for pair in range(channels // 2):
        frequency = model.rope_theta ** (-2 * pair / channels)
        divided = 0.0
        if scaling is not None and scaling.kind == "linear":
            divided = 1.0
        elif scaling is not None and scaling.kind == "llama3":
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_length / scaling.low_freq_factor
            shortest = scaling.original_length / scaling.high_freq_factor
            if wavelength > longest:
                divided = 1.0
            elif wavelength > shortest:
                divided = (1 / shortest - 1 / wavelength) / (1 / shortest - 1 / longest)
        elif scaling is not None:
            first, last = (
                channels / 2 * math.log(scaling.original_length / (2 * math.pi * turns), model.rope_theta)
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), channels - 1)
            divided = min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
        factor = 1.0 if scaling is None else scaling.factor
        found.append(divided * frequency / factor + (1 - divided) * frequency)
    return found


def _stretch(model: ModelConfig) -> float:
    """Factor on rotated queries and keys."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def _feed_forward(model: ModelConfig, layer: Mapping[str, Tensor], x: Tensor) -> Tensor:
    inner = _linear(layer, "mlp.linear_fc1", x)
    if model.activation == "swiglu":
        gate, up = inner.chunk(2, -1)
        inner = gate * torch.sigmoid(gate) * up
    elif model.activation == "geglu":
        gate, up = inner.chunk(2, -1)
        inner = _gelu_tanh(gate) * up
    elif model.activation == "gelu_tanh":
        inner = _gelu_tanh(inner)
    else:
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    return _linear(layer, "mlp.linear_fc2", inner)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
