"""One pre-norm transformer layer and its gated feed-forward, with recomputation that needs no Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.engine.tensor_parallel import CheckpointWithoutOutput, checkpoint
from flm_megatron.engine.transformer import MLP, TransformerLayer
from flm_megatron.model.engine_config import gelu_tanh
from flm_megatron.model.fp8_linear import casts_input
from flm_megatron.model.norms import RMSNorm

AddFunction = Callable[[bool, bool], Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]]
"""The engine's bias, dropout and add: of `training` and `fused`, then of output and bias, residual and probability."""


class TeleFLMLayer(TransformerLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `parallel_residual` both of the layer's input.

    The engine's layer with a forward pass of its own, without what Tele-FLM does not have: cross attention, experts,
    inference kernels.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for norm, reader in (
            (self.input_layernorm, self.self_attention.linear_qkv),
            (self.pre_mlp_layernorm, self.mlp.linear_fc1),
        ):
            if isinstance(norm, RMSNorm):
                norm.unwritten = casts_input(reader)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: object = None,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, hidden] of the layer, and `context` unchanged."""
        recompute = self.config.recompute_norms_and_mlp and self.training and torch.is_grad_enabled()
        attended = self._attention(hidden_states, recompute, attention_mask, rotary_pos_emb, packed_seq_params)
        # What is recomputed starts at the sum, which is kept, or at the layer's input.
        feed_forward = partial(checkpoint, self._feed_forward, False) if recompute else self._feed_forward
        if self.config.parallel_residual:
            return self._add(self.self_attn_bda, attended, feed_forward(hidden_states)), context
        if recompute or attended[1] is not None or not isinstance(self.pre_mlp_layernorm, RMSNorm):
            hidden_states = self._add(self.self_attn_bda, attended, hidden_states)
            return feed_forward(hidden_states), context
        normed, hidden_states = self.pre_mlp_layernorm(attended[0], hidden_states)
        return self._add(self.mlp_bda, self.mlp(normed), hidden_states), context

    def _attention(
        self,
        hidden_states: Tensor,
        recompute: bool,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None,
        packed_seq_params: object,
    ) -> tuple[Tensor, Tensor | None]:
        # `fp8=None`: with the engine's default it calls Transformer Engine, installed or not.
        # A norm that is not written has no output to discard.
        keeps = not (isinstance(self.input_layernorm, RMSNorm) and self.input_layernorm.unwritten)
        norm = CheckpointWithoutOutput(fp8=None) if recompute and keeps else None
        normed = norm.checkpoint(self.input_layernorm, hidden_states) if norm else self.input_layernorm(hidden_states)
        output, bias = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        if norm:
            norm.discard_output_and_register_recompute(output)
        return output, bias

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        # The bias is added in here: returned by a checkpointed function, the parameter itself would become an output
        # of the graph, and its backward pass would not end.
        return self._add(self.mlp_bda, self.mlp(self.pre_mlp_layernorm(hidden_states)), hidden_states)

    def _add(self, bias_dropout_add: AddFunction, output: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        return bias_dropout_add(self.training, self.config.bias_dropout_fusion)(output, residual, self.hidden_dropout)


class GatedMLP(MLP):
    """linear_fc2(silu(gate) * up), or with GELU in place of SiLU; gate and up are the two halves of linear_fc1's
    output."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: object
    ) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, hidden], and linear_fc2's bias, which is not added yet."""
        assert per_token_scale is None, "there are no experts"
        fused, bias = self.linear_fc1(hidden_states)
        activation = kernels.unwritten_swiglu if casts_input(self.linear_fc2) else kernels.swiglu
        if self.config.activation_func is gelu_tanh:
            activation = kernels.geglu
        return self.linear_fc2(activation(fused if bias is None else fused + bias))
