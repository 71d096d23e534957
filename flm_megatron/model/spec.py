"""The modules that a layer is made of."""

from __future__ import annotations

from flm_megatron.engine.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from flm_megatron.engine.transformer import (
    MLP,
    AttnMaskType,
    MLPSubmodules,
    ModuleSpec,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_num_layers_to_build,
    mlp_spec,
    transformer_engine_block,
)
from flm_megatron.model.attention.core import CoreAttention
from flm_megatron.model.attention.self_attention import PackedSelfAttention
from flm_megatron.model.engine_config import EngineConfig
from flm_megatron.model.fp8_linear import in_fp8
from flm_megatron.model.layer import GatedMLP, TeleFLMLayer
from flm_megatron.model.lora import linear
from flm_megatron.model.norms import HeadNorm, LayerNorm, RMSNorm
from flm_megatron.model.parameters import NORM_MODULES
from flm_megatron.model.parameters.names import LAYERS

# Checkpoints name norms after the linear layer that reads them, as Transformer Engine's fused layers do.
NORM_NAMES = {
    f"{module.removeprefix(LAYERS)}.": f"{name.removeprefix(LAYERS)}_" for name, module in NORM_MODULES.items()
}


def block_spec(config: EngineConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers and final norm of model chunk `vp_stage` of this pipeline rank."""
    layers = get_num_layers_to_build(config, vp_stage)
    if config.transformer_engine:
        return transformer_engine_block(layers, _head_norm(config))
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * layers, layer_norm=_norm(config))


def layer_spec(config: EngineConfig) -> ModuleSpec:
    """One Tele-FLM layer in plain PyTorch modules."""
    norm = _norm(config)
    attention = SelfAttentionSubmodules(
        linear_qkv=_column("qkv", config),
        core_attention=CoreAttention,
        linear_proj=_row("projection", config),
        q_layernorm=_head_norm(config),
        k_layernorm=_head_norm(config),
    )
    feed_forward = MLPSubmodules(linear_fc1=_column("fc1", config), linear_fc2=_row("fc2", config))
    return ModuleSpec(
        module=TeleFLMLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(PackedSelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(GatedMLP if config.gated_linear_unit else MLP, feed_forward),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NORM_NAMES,
        ),
    )


def _column(target: str, config: EngineConfig) -> type:
    return in_fp8(linear(ColumnParallelLinear, target, config.lora), config.fp8_scaling, column=True)


def _row(target: str, config: EngineConfig) -> type:
    return in_fp8(linear(RowParallelLinear, target, config.lora), config.fp8_scaling, column=False)


def _norm(config: EngineConfig) -> type[RMSNorm] | type[LayerNorm]:
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def _head_norm(config: EngineConfig) -> type[HeadNorm] | None:
    """That of queries and keys, where there is one."""
    return HeadNorm if config.qk_layernorm else None
