"""torchtitan's Llama 3 of the stage's shape, with causal scaled dot-product attention (made for torchtitan 0.3)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from flm_megatron.benchmarking.peers.peer import plain_step
from flm_megatron.benchmarking.steps import Step
from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from torchtitan.models.llama3 import Llama3Model

SERIES = "0.3."


def torchtitan_step(stage: StageConfig, sequence_length: int) -> Step:
    """Its training step.

    Raises:
        RequestError: it is installed in another version, or activations are to be recomputed, which its trainer
            does and its model does not.
    """
    found = version("torchtitan")
    if not found.startswith(SERIES):
        raise RequestError(f"--compare torchtitan: version {found} is installed, {SERIES}x is known")
    if stage.recompute != "none":
        raise RequestError("--compare torchtitan: its model has no recomputation of its own; set recompute to none")
    model = titan_config(stage, sequence_length).build()
    model.init_states()
    model = model.to(current().torch_device)
    return plain_step(model, model, stage)


def titan_config(stage: StageConfig, sequence_length: int) -> Llama3Model.Config:
    """torchtitan's configuration of the shape."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import Llama3Model, _build_llama3_layers

    model = stage.model
    assert model.vocab_size
    hidden, start = model.hidden_size, {"weight": torch.nn.init.ones_}
    rope = ComplexRoPE.Config(
        dim=model.kv_channels, max_seq_len=sequence_length, theta=model.rope_theta, scaling="none"
    )
    layers = _build_llama3_layers(
        n_layers=model.num_layers,
        dim=hidden,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.query_groups,
        hidden_dim=model.ffn_hidden_size,
        rope=rope,
        attn_backend="flex",
    )
    for layer in layers:  # its language models mask by document, with kernels that only run compiled
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return Llama3Model.Config(
        dim=hidden,
        vocab_size=model.vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=model.vocab_size, embedding_dim=hidden, param_init=start),
        norm=RMSNorm.Config(normalized_shape=hidden, param_init=start),
        lm_head=Linear.Config(in_features=hidden, out_features=model.vocab_size, param_init=start),
        layers=layers,
    )
