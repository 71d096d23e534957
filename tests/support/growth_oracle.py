"""A small float64 decoder over logical tensors, with growth masks: the oracle of the growth tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flm_megatron.config.schema import ModelConfig
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.mask_plan import MaskPlan

LAYER = "decoder.layers."


@dataclass
class Masks:
    """Vectors that are 1 on old units and v on new ones; a layer's blend is v for copies."""

    hidden: Tensor
    ffn: Tensor
    heads: Tensor
    layers: list[float]


def open_masks(model: ModelConfig) -> Masks:
    """Masks that do nothing."""
    one = torch.ones
    return Masks(
        one(model.hidden_size).double(),
        one(model.ffn_hidden_size).double(),
        one(model.num_attention_heads).double(),
        [1.0] * model.num_layers,
    )


def masks_at(plan: GrowthPlan, v: float) -> Masks:
    """Masks of a plan at v, and those of earlier growths as they are where it begins."""
    masks, old, new = open_masks(plan.new), plan.old, plan.new
    if "hidden" in plan.masked:
        masks.hidden[old.hidden_size :] = v
    if "ffn" in plan.masked:
        masks.ffn[old.ffn_hidden_size :] = v
    if "heads" in plan.masked:
        per_group = masks.heads.view(new.query_groups, -1)
        per_group[old.query_groups :] = v
        per_group[:, old.num_attention_heads // old.query_groups :] = v
    if "layers" in plan.masked:
        masks.layers = [v if s.copy else 1.0 for s in plan.layer_sources]
    for opening in plan.earlier_masks:
        _add(masks, new, opening.masks, opening.done / opening.steps)
    return masks


def _add(masks: Masks, model: ModelConfig, earlier: MaskPlan, v: float) -> None:
    """Masks of dimensions that the plan itself does not grow."""
    if earlier.hidden:
        masks.hidden[earlier.hidden :] = v
    if earlier.ffn:
        masks.ffn[earlier.ffn :] = v
    if earlier.heads:
        per_group = masks.heads.view(model.query_groups, -1)
        per_group[earlier.heads[0] :] = v
        per_group[:, earlier.heads[1] :] = v
    for layer in earlier.layers:
        masks.layers[layer] = v


def logits(model: ModelConfig, tensors: Mapping[str, Tensor], tokens: Tensor, masks: Masks | None = None) -> Tensor:
    """Logits [batch, sequence, vocabulary] in float64 of `tokens` [batch, sequence]."""
    masks = masks or open_masks(model)
    weights = {name: t.double() for name, t in tensors.items()}
    x = torch.nn.functional.embedding(tokens, weights["embedding.word_embeddings.weight"])
    if model.position == "learned":
        x = x + weights["embedding.position_embeddings.weight"][: tokens.shape[1]]
    x = x * model.input_mult
    for i, blend in enumerate(masks.layers):
        layer = {name[len(LAYER) :]: t[i] for name, t in weights.items() if name.startswith(LAYER)}
        y = x + attention(model, layer, norm(model, layer, "self_attention.linear_qkv.layer_norm_", x, masks), masks)
        read = x if model.parallel_residual else y
        y = y + feed_forward(model, layer, norm(model, layer, "mlp.linear_fc1.layer_norm_", read, masks), masks)
        x = blend * y + (1 - blend) * x
    x = norm(model, weights, "decoder.final_layernorm.", x, masks)
    head = weights["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"]
    return x @ head.T * model.logit_multiplier


def norm(model: ModelConfig, weights: Mapping[str, Tensor], prefix: str, x: Tensor, masks: Masks) -> Tensor:
    """RMSNorm or LayerNorm whose sums are weighted by the mask, which is on the output too."""
    m = masks.hidden
    if model.normalization == "layernorm":
        x = x - (x * m).sum(-1, keepdim=True) / m.sum()
    x = x * torch.rsqrt((x**2 * m).sum(-1, keepdim=True) / m.sum() + model.norm_epsilon)
    return (x * weights[prefix + "weight"] + weights.get(prefix + "bias", torch.zeros(1).double())) * m


def attention(model: ModelConfig, layer: Mapping[str, Tensor], x: Tensor, masks: Masks) -> Tensor:
    """Grouped-query attention with rotary positions; what the projection reads of new heads is masked."""
    batch, length, _ = x.shape
    groups, channels = model.query_groups, model.kv_channels
    per_group = model.num_attention_heads // groups
    qkv = x @ layer["self_attention.linear_qkv.weight"].T + layer.get("self_attention.linear_qkv.bias", 0)
    qkv = qkv.view(batch, length, groups, per_group + 2, channels)
    q, k, v = qkv[..., :per_group, :], qkv[..., per_group, :], qkv[..., per_group + 1, :]
    if model.query_key_norm:
        q, k = (head_norm(model, x, layer[f"self_attention.{n}_layernorm.weight"]) for n, x in (("q", q), ("k", k)))
    q, k = rotate(model, q.flatten(2, 3)), rotate(model, k)
    k, v = (t.repeat_interleave(per_group, 2) for t in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(channels)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    out = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).view(batch, length, groups, per_group, channels)
    out = out * masks.heads.view(groups, per_group, 1)
    weight, bias = layer["self_attention.linear_proj.weight"], layer.get("self_attention.linear_proj.bias", 0)
    return out.flatten(2) @ weight.T + bias


def head_norm(model: ModelConfig, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of [..., channels] of a head, with an epsilon of its own."""
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + model.query_key_epsilon) * weight


def rotate(model: ModelConfig, x: Tensor) -> Tensor:
    """Half-rotation rotary positions of [batch, sequence, heads, channels], of the first 2 x half channels."""
    if model.position == "learned":
        return x
    half = int(model.kv_channels * model.rotary_percent) // 2
    inverse = model.rope_theta ** (-torch.arange(half).double() / half)
    angle = torch.outer(torch.arange(x.shape[1]).double(), inverse)[:, None]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def feed_forward(model: ModelConfig, layer: Mapping[str, Tensor], x: Tensor, masks: Masks) -> Tensor:
    """Gated or not, masked where the second matrix reads it."""
    y = x @ layer["mlp.linear_fc1.weight"].T + layer.get("mlp.linear_fc1.bias", 0)
    gate, up = y.chunk(2, -1) if model.gated else (y, 1.0)
    if model.activation == "swiglu":
        y = torch.nn.functional.silu(gate) * up
    else:
        y = torch.nn.functional.gelu(gate, approximate="none" if model.activation == "gelu" else "tanh") * up
    return (y * masks.ffn) @ layer["mlp.linear_fc2.weight"].T + layer.get("mlp.linear_fc2.bias", 0)
