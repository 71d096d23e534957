"""The logical tensors of a model: names, global shapes and what each one is, from its configuration alone.

Names and shapes are those of megatron-core's `torch_dist` checkpoints: the layers of one kind are stacked on the
first axis, the query-key-value matrix is ordered by query group, the gated first feed-forward matrix has all gate
rows before all up rows. The vocabulary is the true one, without padding. No torch here: planning, growth, export
and initial weights all start from this table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flm_megatron.config.schema import LoraConfig, ModelConfig
from flm_megatron.errors import RequestError

Kind = Literal["embedding", "head", "matrix", "norm", "bias"]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
ATTENTION_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm"
QKV = "decoder.layers.self_attention.linear_qkv"
PROJECTION = "decoder.layers.self_attention.linear_proj"
MLP_NORM = "decoder.layers.mlp.linear_fc1.layer_norm"
FC1 = "decoder.layers.mlp.linear_fc1"
FC2 = "decoder.layers.mlp.linear_fc2"


@dataclass(frozen=True)
class ParameterSpec:
    """One logical parameter.

    `shape` is global; with `stacked` its first axis counts layers. `init_std` is the standard deviation of the
    truncated normal it starts from; at 0 it starts at the constant `init_mean`. `lr_scale` multiplies the
    learning rate of its kind (muP: 1/m for matrices). One that is not `trained`, beside adapters, has no optimizer
    state.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    stacked: bool
    init_std: float
    init_mean: float = 0.0
    lr_scale: float = 1.0
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def parameter_specs(model: ModelConfig) -> dict[str, ParameterSpec]:
    """Table of all logical parameters of `model` by name, in the order of execution.

    muP (Tele-FLM, m the width factor): matrices start with std sigma / sqrt(m) and learn at lr / m; the two
    residual output matrices start smaller by sqrt(2 L); embeddings, head and norms do not scale with width.

    Raises:
        ValueError: the vocabulary size is not known yet.
    """
    if not model.vocab_size:
        raise RequestError("model.vocab_size is not set: give it, or give a tokenizer to take it from")
    specs = {spec.name: spec for spec in _specs(model, model.vocab_size)}
    if model.lora is None:
        return specs
    frozen = {name: replace(spec, trained=False) for name, spec in specs.items()}
    return frozen | {spec.name: spec for spec in _adapters(model, model.lora, specs)}


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters with the true vocabulary."""
    return sum(spec.numel for spec in parameter_specs(model).values())


def _specs(model: ModelConfig, vocab: int) -> Iterator[ParameterSpec]:
    layers, hidden, ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
    heads, groups, channels = model.num_attention_heads, model.query_groups, model.kv_channels
    std = model.matrix_init_std / math.sqrt(model.width_factor)
    residual_std = std / math.sqrt(2 * layers)
    yield ParameterSpec(EMBEDDING, (vocab, hidden), "embedding", False, model.vector_init_std)
    yield from _norm(model, ATTENTION_NORM, layers)
    yield from _linear(model, QKV, ((heads + 2 * groups) * channels, hidden), std)
    yield from _linear(model, PROJECTION, (hidden, heads * channels), residual_std)
    yield from _norm(model, MLP_NORM, layers)
    yield from _linear(model, FC1, (ffn * (2 if model.gated else 1), hidden), std)
    yield from _linear(model, FC2, (hidden, ffn), residual_std)
    yield from _norm(model, FINAL_NORM, None)
    yield ParameterSpec(HEAD, (vocab, hidden), "head", False, model.vector_init_std)


TARGETS = {"qkv": QKV, "projection": PROJECTION, "fc1": FC1, "fc2": FC2}


def _adapters(model: ModelConfig, lora: LoraConfig, specs: Mapping[str, ParameterSpec]) -> Iterator[ParameterSpec]:
    """A starts with the variance that keeps its output's at its input's, B at zero (LoRA, arXiv 2106.09685)."""
    for target in lora.targets:
        name = TARGETS[target]
        layers, rows, columns = specs[f"{name}.weight"].shape
        scale = 1 / model.width_factor
        yield ParameterSpec(
            f"{name}.lora_a", (layers, lora.rank, columns), "matrix", True, columns**-0.5, lr_scale=scale
        )
        yield ParameterSpec(f"{name}.lora_b", (layers, rows, lora.rank), "matrix", True, 0.0, lr_scale=scale)


def _linear(model: ModelConfig, name: str, shape: tuple[int, int], std: float) -> Iterator[ParameterSpec]:
    layers = model.num_layers
    yield ParameterSpec(f"{name}.weight", (layers, *shape), "matrix", True, std, lr_scale=1 / model.width_factor)
    if model.bias:
        yield ParameterSpec(f"{name}.bias", (layers, shape[0]), "bias", True, 0.0)


def _norm(model: ModelConfig, name: str, layers: int | None) -> Iterator[ParameterSpec]:
    dot = "_" if name.endswith("layer_norm") else "."
    shape = (model.hidden_size,) if layers is None else (layers, model.hidden_size)
    yield ParameterSpec(f"{name}{dot}weight", shape, "norm", layers is not None, 0.0, init_mean=1.0)
    if model.normalization == "layernorm":
        yield ParameterSpec(f"{name}{dot}bias", shape, "bias", layers is not None, 0.0)
