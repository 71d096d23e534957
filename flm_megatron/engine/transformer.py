"""megatron-core's layers, their specs and the GPT model; importing this imports the engine."""

from __future__ import annotations

from functools import partial

from torch import nn

from flm_megatron.engine.prepare import prepare
from flm_megatron.engine.version import since

prepare()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

__all__ = [
    "MLP",
    "AttnMaskType",
    "GPTModel",
    "MLPSubmodules",
    "ModuleSpec",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "get_bias_dropout_add",
    "get_gpt_layer_local_spec",
    "get_num_layers_to_build",
    "mlp_spec",
    "transformer_engine_block",
    "without_cuda_graphs",
]


def mlp_spec(module: type[MLP], submodules: MLPSubmodules) -> object:
    """What a layer's `mlp` is built from: a ModuleSpec, or from 0.19 on a function."""
    if since(0, 19):
        return partial(module.as_mlp_submodule, submodules)
    return ModuleSpec(module, submodules=submodules)


def without_cuda_graphs() -> dict[str, object]:
    """The fields of TransformerConfig that say which parts are captured: none (their default is a name it warns of)."""
    return {"cuda_graph_modules" if since(0, 19) else "cuda_graph_scope": []}


def transformer_engine_block(layers: int, head_norm: type[nn.Module] | None) -> TransformerBlockSubmodules:
    """Layers and final norm made of Transformer Engine's modules, and `head_norm` of queries and of keys, if given."""
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec()
    if head_norm is not None:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = head_norm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TENorm)
