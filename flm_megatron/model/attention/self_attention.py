"""Self-attention that rotates queries and keys in place in the packed projection."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.engine import parallel_state
from flm_megatron.engine.transformer import SelfAttention
from flm_megatron.model.attention.segments import whole_sequences


class PackedSelfAttention(SelfAttention):
    """The engine's self-attention, with query groups folded into the batch instead of queries copied out.

    It skips what Tele-FLM does not have: inference contexts, output gates.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: object = None,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, hidden] of the projection, and its bias, which is not added yet.

        `rotary_pos_emb` [sequence, 1, 1, turned channels] holds the angle of each channel that turns, none where
        positions are learned; `attention_mask` is as in `CoreAttention`.
        """
        assert packed_seq_params is None, "sequences are not packed in the engine's way"
        packed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        sequence, batch, groups, _ = packed.shape
        queries = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        if self.q_layernorm is not None:
            packed = self._normed(packed, queries)
        if rotary_pos_emb is None:
            folded = packed.reshape(sequence, batch * groups, queries + 2, -1)
            query, key, value = folded.split([queries, 1, 1], dim=2)
        else:
            cos, sin = _tables(rotary_pos_emb)
            channels = self.hidden_size_per_attention_head
            query, key, value = kernels.rotary_qkv(packed.flatten(2), cos, sin, queries, channels)
        if self.config.num_query_groups < self.world_size:
            query = self._own_queries(query)
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.size(0) > 1:
            attention_mask = attention_mask.repeat_interleave(groups, 0)
        if attention_mask is None and self.config.sliding_window is not None:
            attention_mask = whole_sequences(batch, sequence, query.device)
        output = self.core_attention(query, key, value, attention_mask)
        return self.linear_proj(output.view(sequence, batch, -1))

    def _normed(self, packed: Tensor, queries: int) -> Tensor:
        """`packed` [sequence, batch, groups, (queries + 2) x channels] with each query and key normalised."""
        heads = packed.unflatten(-1, (queries + 2, -1))
        query, key, value = heads.split([queries, 1, 1], dim=-2)
        return torch.cat([self.q_layernorm(query), self.k_layernorm(key), value], dim=-2).flatten(-2)

    def _own_queries(self, query: Tensor) -> Tensor:
        """This rank's queries of a query group that several ranks share."""
        sharing = self.world_size // self.config.num_query_groups
        return query.chunk(sharing, dim=2)[parallel_state.get_tensor_model_parallel_rank() % sharing]


@lru_cache(maxsize=2)
def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [sequence, turned channels / 2]; the engine passes the same tensor of angles to all layers and
    steps."""
    half = angles[:, 0, 0, : angles.size(-1) // 2]
    return half.cos(), half.sin()
