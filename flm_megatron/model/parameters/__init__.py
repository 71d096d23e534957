"""The one table of parameters: names, axes and what each logical tensor is, from a model's configuration alone.

A row of the table (`ParameterSpec`) says everything that the rest of the program has to know of a parameter, so that
nothing else tells parameters apart by their names:

* its `axes`: what each counts (`Unit`: layers, hidden channels, feed-forward units, heads, vocabulary ...), whether a
  matrix gives it or takes it (`side`), the bands it is laid out in (gate and up; queries, key and value of every query
  group), and how tensor parallelism cuts it (`Cut`). Sharding multiplies the shards of the axes, growth compares
  the axes of the old and the new model band by band, the planner counts shards, import and export go by bands;
* its `kind`: the optimizer's group, weight decay, muP;
* its first values and its factor on the learning rate;
* its names in checkpoints and in module trees.

A new kind of parameter is one more row: an expert's matrix has the axes of the feed-forward matrices, with one that
counts experts. Names and shapes are those of megatron-core's
`torch_dist` checkpoints: the layers of one kind are stacked on the first axis, the query-key-value matrix is ordered
by query group, the gated first feed-forward matrix has all gate rows before all up rows. The vocabulary is the true
one, without padding. No torch here: planning, growth, export and initial weights all start from this table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from flm_megatron.config.schema import LoraConfig, ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters.axis import Axis, Band, Cut, Side, Unit
from flm_megatron.model.parameters.names import LAYERS
from flm_megatron.model.parameters.spec import Kind, ParameterSpec

__all__ = [
    "ATTENTION_NORM",
    "EMBEDDING",
    "FC1",
    "FC2",
    "FINAL_NORM",
    "HEAD",
    "KEY_NORM",
    "MLP_NORM",
    "NORM_MODULES",
    "POSITIONS",
    "PROJECTION",
    "QKV",
    "QUERY_NORM",
    "TARGETS",
    "Axis",
    "Band",
    "Cut",
    "Kind",
    "ParameterSpec",
    "Side",
    "Unit",
    "parameter_count",
    "parameter_specs",
]

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
QKV = f"{LAYERS}self_attention.linear_qkv"
PROJECTION = f"{LAYERS}self_attention.linear_proj"
FC1 = f"{LAYERS}mlp.linear_fc1"
FC2 = f"{LAYERS}mlp.linear_fc2"
ATTENTION_NORM = f"{QKV}.layer_norm"
MLP_NORM = f"{FC1}.layer_norm"
QUERY_NORM = f"{LAYERS}self_attention.q_layernorm"
KEY_NORM = f"{LAYERS}self_attention.k_layernorm"
TARGETS = {"qkv": QKV, "projection": PROJECTION, "fc1": FC1, "fc2": FC2}
NORM_MODULES = {ATTENTION_NORM: f"{LAYERS}input_layernorm", MLP_NORM: f"{LAYERS}pre_mlp_layernorm"}
"""The norms of a layer where they are modules of their own."""


def parameter_specs(model: ModelConfig) -> dict[str, ParameterSpec]:
    """Table of all logical parameters of `model` by name, in the order of execution.

    muP (Tele-FLM, m the width factor): matrices start with std sigma / sqrt(m) and learn at lr / m; the two
    residual output matrices start smaller by sqrt(2 L); embeddings, head and norms do not scale with width. A tied
    head is the embedding, whose row is the only one: muP gives both the same deviation and learning rate (table 8 of
    arXiv 2203.03466), and the logits are divided by m as ever.

    Raises:
        RequestError: the vocabulary size is not known yet.
    """
    if not model.vocab_size:
        raise RequestError("model.vocab_size is not set: give it, or give a tokenizer to take it from")
    specs = {spec.name: spec for spec in _rows(model, model.vocab_size)}
    if model.lora is None:
        return specs
    frozen = {name: replace(spec, trained=False) for name, spec in specs.items()}
    return frozen | {spec.name: spec for spec in _adapters(model, model.lora, specs)}


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters with the true vocabulary."""
    return sum(spec.numel for spec in parameter_specs(model).values())


def _rows(model: ModelConfig, vocab: int) -> Iterator[ParameterSpec]:
    tokens = Axis(Unit.VOCABULARY, (Band(vocab),), cut=Cut.PADDED)
    own, tied = HEAD if model.tie_embeddings else None, model.tie_embeddings
    axes = (tokens, _hidden(model, "out"))
    yield ParameterSpec(EMBEDDING, axes, "embedding", model.vector_init_std, module_name=own, tied=tied)
    if model.max_positions:
        places = Axis(Unit.POSITION, (Band(model.max_positions),))
        yield ParameterSpec(POSITIONS, (places, _hidden(model, "out")), "embedding", model.vector_init_std)
    if model.num_layers:
        yield from _layer_rows(model)
    yield from _norm(model, FINAL_NORM)
    if not tied:
        yield ParameterSpec(HEAD, (tokens, _hidden(model, "in")), "head", model.head_std)


def _layer_rows(model: ModelConfig) -> Iterator[ParameterSpec]:
    std = model.matrix_init_std / math.sqrt(model.width_factor)
    residual_std = std / math.sqrt(2 * model.num_layers)
    yield from _norm(model, ATTENTION_NORM)
    biased = model.bias or model.qkv_bias
    yield from _linear(model, QKV, (_query_key_value(model), _hidden(model, "in")), std, biased)
    if model.query_key_norm:
        yield from _query_key_norms(model)
    yield from _linear(model, PROJECTION, (_hidden(model, "out"), _heads(model)), residual_std, model.bias)
    yield from _norm(model, MLP_NORM)
    yield from _linear(model, FC1, (_ffn(model, "out"), _hidden(model, "in")), std, model.bias)
    yield from _linear(model, FC2, (_hidden(model, "out"), _ffn(model, "in")), residual_std, model.bias)


def _layers(model: ModelConfig) -> Axis:
    return Axis(Unit.LAYER, (Band(model.num_layers),))


def _hidden(model: ModelConfig, side: Side | None) -> Axis:
    return Axis(Unit.HIDDEN, (Band(model.hidden_size),), side=side)


def _query_key_value(model: ModelConfig) -> Axis:
    """Per query group the channels of its queries, its key and its value."""
    channels = model.kv_channels
    bands = (Band(_queries(model), "query"), Band(channels, "key"), Band(channels, "value"))
    return Axis(Unit.HEAD, bands, model.query_groups, "out", Cut.GROUPS)


def _heads(model: ModelConfig) -> Axis:
    """Per query group the channels of its heads' outputs."""
    return Axis(Unit.HEAD, (Band(_queries(model)),), model.query_groups, "in", Cut.GROUPS)


def _queries(model: ModelConfig) -> int:
    """Channels of the query heads of one group."""
    return model.num_attention_heads // model.query_groups * model.kv_channels


def _ffn(model: ModelConfig, side: Side) -> Axis:
    """Feed-forward units: a gated first matrix gives two values for each, all gates before all ups."""
    size = model.ffn_hidden_size
    gated = side == "out" and model.gated
    bands = (Band(size, "gate"), Band(size, "up")) if gated else (Band(size),)
    return Axis(Unit.FFN, bands, side=side, cut=Cut.BANDS)


def _linear(
    model: ModelConfig, name: str, axes: tuple[Axis, Axis], std: float, biased: bool
) -> Iterator[ParameterSpec]:
    """A matrix of every layer and, if `biased`, its bias, which is cut as the matrix's output is."""
    layers, scale = _layers(model), 1 / model.width_factor
    yield ParameterSpec(f"{name}.weight", (layers, *axes), "matrix", std, lr_scale=scale)
    if biased:
        yield ParameterSpec(f"{name}.bias", (layers, axes[0]), "bias", 0.0, value="bias")


def _norm(model: ModelConfig, name: str) -> Iterator[ParameterSpec]:
    """Weight and, of a LayerNorm, bias of the final norm or of one before a linear layer."""
    own = NORM_MODULES.get(name)
    axes = (_hidden(model, None),) if own is None else (_layers(model), _hidden(model, None))
    dot = "." if own is None else "_"
    yield ParameterSpec(f"{name}{dot}weight", axes, "norm", 0.0, 1.0, module_name=own and f"{own}.weight")
    if model.normalization == "layernorm":
        yield ParameterSpec(f"{name}{dot}bias", axes, "bias", 0.0, value="bias", module_name=own and f"{own}.bias")


def _query_key_norms(model: ModelConfig) -> Iterator[ParameterSpec]:
    """Weights that all heads of a layer share. A tensor rank has them whole, and the gradient of its own heads."""
    axes = (_layers(model), Axis(Unit.HEAD_DIM, (Band(model.kv_channels),)))
    for name in (QUERY_NORM, KEY_NORM):
        yield ParameterSpec(f"{name}.weight", axes, "norm", 0.0, 1.0)


def _adapters(model: ModelConfig, lora: LoraConfig, specs: Mapping[str, ParameterSpec]) -> Iterator[ParameterSpec]:
    """A starts with the variance that keeps its output's at its input's, B at zero (LoRA, arXiv 2106.09685).

    The factor on the side on which the matrix is cut is cut with it, the other is whole.
    """
    for target in lora.targets:
        name = TARGETS[target]
        layers, rows, columns = specs[f"{name}.weight"].axes
        inner, scale = (Band(lora.rank),), 1 / model.width_factor
        first = (layers, Axis(Unit.ADAPTER_RANK, inner, side="out"), columns)
        second = (layers, rows, Axis(Unit.ADAPTER_RANK, inner, side="in"))
        std = columns.size**-0.5
        yield ParameterSpec(f"{name}.lora_a", first, "matrix", std, lr_scale=scale, value="lora_a")
        yield ParameterSpec(f"{name}.lora_b", second, "matrix", 0.0, lr_scale=scale, value="lora_b")
