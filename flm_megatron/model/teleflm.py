"""Tele-FLM on megatron-core's GPTModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from flm_megatron.engine.transformer import GPTModel
from flm_megatron.errors import RequestError
from flm_megatron.model.attention.cache import KeyValueCache
from flm_megatron.model.attention.core import CoreAttention
from flm_megatron.model.engine_config import EngineConfig
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.model.positions import positions_of, scaled_frequencies
from flm_megatron.model.spec import block_spec


class TeleFLM(GPTModel):
    """A decoder with Tele-FLM's two multipliers, which never predicts padding ids.

    The embedding output is multiplied by `input_mult`, the final hidden state by `logit_multiplier` before the head,
    which is the embedding with `tie_embeddings`.
    Logits of ids from the true vocabulary size on are -inf, so padding does not change the loss and the rows behind it
    get zero gradients.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        padded_vocab_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        assert model.vocab_size, "the vocabulary size comes with the model or its tokenizer"
        super().__init__(
            config,
            block_spec(config, vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_positions or 0,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope" if model.rotates else "learned_absolute",
            rotary_percent=model.rotary_percent,
            rotary_base=model.rope_theta,  # type: ignore[arg-type]
            vp_stage=vp_stage,
        )
        if model.rope_scaling is not None:
            frequencies = self.rotary_pos_emb.inv_freq
            self.rotary_pos_emb.inv_freq = scaled_frequencies(frequencies, model.rope_scaling, model.rope_theta)
        self.max_positions = model.max_positions
        if self.max_positions and pre_process:  # the engine makes a table on the host, in fp32
            table = torch.empty(
                self.max_positions, config.hidden_size, device=current().torch_device, dtype=config.params_dtype
            )
            self.embedding.position_embeddings.weight = torch.nn.Parameter(table)
        self.specs = parameter_specs(model)
        self.true_vocab_size = model.vocab_size
        self.input_multiplier = model.input_mult
        self.logit_multiplier = model.logit_multiplier
        self.cache: KeyValueCache | None = None
        self._cached = slice(0)
        self._teacher: Tensor | None = None

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        loss_mask: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Loss of each token [batch, sequence] in fp32 with `labels`, else logits [batch, sequence, vocabulary].

        With a `loss_mask` [batch, sequence] besides it is the sum over tokens of mask times loss (0-dim): training and
        validation want no more, and head and loss may then be one operation. Its gradient has to be one. With the
        logits of a `teacher` as well [batch, sequence, ids], for the ids of this rank's shard that are no padding, it
        is that sum and the sum of mask times KL(teacher || student) at the configured temperature [2].

        `tokens` and `labels` are [batch, sequence]. Positions are those of the sequence, learned ones those of
        `positions_of`, whatever `position_ids` says; `attention_mask` [batch or 1, 1, sequence, sequence] is true where
        attention must not look, or it is of `segment_ends`, within which attention stays; none leaves it causal. Logits
        cover this tensor-parallel rank's shard of the padded vocabulary, or all of it with `runtime_gather_output`. A
        pipeline rank that is not the last returns hidden states.

        Raises:
            RequestError: the sequence is longer than the learned positions.
        """
        if self.cache is not None:
            self._cached = self.cache.begin(tokens.size(1))
        if self.max_positions:
            position_ids = self._learned_positions(tokens, attention_mask)
        self._teacher = teacher
        try:
            return super().forward(
                tokens,
                position_ids,
                attention_mask,
                labels=labels,
                runtime_gather_output=runtime_gather_output,
                loss_mask=loss_mask,
            )
        finally:
            self._teacher = None

    def head_weight(self) -> torch.nn.Parameter:
        """The rows of the vocabulary that the last chunk multiplies hidden states by: of a tied head the embedding, or
        under a pipeline its copy."""
        weight = self.output_layer.weight
        return self.embedding.word_embeddings.weight if weight is None else weight

    @contextmanager
    def cached(self, capacity: int) -> Iterator[KeyValueCache]:
        """During the block each forward pass continues where the last one ended, one sequence after another.

        The model must be built without sequence parallelism, from this program's own attention. With a cache it gives
        the logits of the last position only.
        """
        layers = [module for module in self.modules() if isinstance(module, CoreAttention)]
        assert (layers or not self.config.num_layers) and not self.config.sequence_parallel
        holders: list[TeleFLM | CoreAttention] = [self, *layers]
        cache = KeyValueCache(capacity)
        for holder in holders:
            holder.cache = cache
        try:
            yield cache
        finally:
            for holder in holders:
                holder.cache = None

    def _learned_positions(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Positions [batch, sequence], none on a pipeline rank that embeds nothing. Of a batch with a cache, sequences
        that have ended go on beyond them with others that have not, and stay at the last one."""
        assert self.max_positions
        if self.cache is None and tokens.size(1) > self.max_positions:
            raise RequestError(
                f"a sequence has {tokens.size(1)} tokens, the model has {self.max_positions} learned positions "
                "(model.max_positions): give shorter sequences"
            )
        if not self.pre_process:
            return None
        if self.cache is None:
            return positions_of(tokens, attention_mask, 0)
        return positions_of(tokens, attention_mask, self._cached.start).clamp(max=self.max_positions - 1)

    def _preprocess(self, *args: object, **kwargs: object) -> tuple[object, ...]:
        embedded, rotary, *others = super()._preprocess(*args, **kwargs)
        if self.pre_process and self.config.lora is not None and torch.is_grad_enabled():
            embedded.requires_grad_()  # layers computed again in the backward pass need an input with a gradient
        if self.pre_process and embedded.requires_grad and self.config.embedding_gradient_shrink != 1:
            embedded.register_hook(lambda gradient: gradient * self.config.embedding_gradient_shrink)
        if self.pre_process and self.input_multiplier != 1:
            embedded = embedded * self.input_multiplier
        if self.cache is not None and rotary is not None:
            rotary = self.rotary_pos_emb(self.cache.capacity)[self._cached]
        return embedded, rotary, *others

    def _postprocess(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        loss_mask: Tensor | None = None,
        **unused: object,
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.cache is not None:
            hidden_states = hidden_states[-1:]
        if self.logit_multiplier != 1:
            hidden_states = hidden_states * self.logit_multiplier
        if labels is not None and loss_mask is not None and self._teacher is None and self._fuses(hidden_states):
            return self._fused_loss(hidden_states, labels, loss_mask)
        logits, _ = self.output_layer(
            hidden_states, weight=self.head_weight(), runtime_gather_output=runtime_gather_output
        )
        if labels is None:
            self._exclude_padding(logits)
            return logits.transpose(0, 1).contiguous()
        losses = self._losses(logits, labels).t().contiguous()
        if loss_mask is None:
            return losses
        total = (losses * loss_mask).sum()
        return total if self._teacher is None else torch.stack([total, self._divergence(logits, loss_mask)])

    def _divergence(self, logits: Tensor, loss_mask: Tensor) -> Tensor:
        """Sum over tokens of mask times the divergence from the teacher, of logits [sequence, batch, width]."""
        assert self._teacher is not None
        teacher, temperature = self._teacher.transpose(0, 1), self.config.distill_temperature
        found = kernels.kl_divergence(logits, teacher, temperature, self.true_vocab_size, self.pg_collection.tp)
        return (found * loss_mask.t()).sum()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The value to minimise for each token [sequence, batch]; without a teacher, which reads them too, the backward
        pass overwrites the logits with their gradient."""
        labels, group, alone = labels.t(), self.pg_collection.tp, self._teacher is None
        losses = kernels.cross_entropy(logits, labels, self.true_vocab_size, group, overwrite=alone)
        if self.training and self.config.z_loss:
            extra = self.config.z_loss * _z_loss(logits[..., : self._true_width(logits)])
            # Minimised, but not reported: the loss stays comparable.
            losses = losses + (extra - extra.detach())
        return losses

    def _fuses(self, hidden_states: Tensor) -> bool:
        """Whether head and loss run as one operation; the z-loss needs the logits."""
        if self.training and self.config.z_loss:
            return False
        shards = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return kernels.fuses_head_and_loss(hidden_states, self.head_weight(), shards)

    def _fused_loss(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """Sum over tokens of mask times loss, without logits.

        The gradient of the hidden states is a sum over tensor-parallel ranks, reduced as the head's own layer would.
        """
        head, weight, group = self.output_layer, self.head_weight(), self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        buffer = getattr(weight, "main_grad", None) if head.gradient_accumulation_fusion else None
        total, _ = kernels.linear_cross_entropy(
            *(hidden_states, weight, labels.t(), loss_mask.t(), self.true_vocab_size, group),
            buffer=buffer,
            placeholder=head.weight is not None,  # of a tied weight the lookup has a gradient
        )
        if buffer is not None and torch.is_grad_enabled():
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return total

    def _true_width(self, logits: Tensor) -> int:
        """How many ids of this rank's shard of the vocabulary are no padding."""
        width = logits.size(-1)
        start = 0 if width == self.vocab_size else width * self.pg_collection.tp.rank()
        return max(0, min(width, self.true_vocab_size - start))

    def _exclude_padding(self, logits: Tensor) -> None:
        with torch.no_grad():
            logits[..., self._true_width(logits) :].fill_(-torch.inf)


def _z_loss(logits: Tensor) -> Tensor:
    """The squared log of the softmax's denominator, which keeps logits from drifting (PaLM, arXiv 2204.02311).

    log(sum of exponentials)^2 of each token [...] in fp32. `logits` [..., width] is this tensor-parallel rank's
    shard of the vocabulary without padding ids; it may be empty.
    """
    largest = logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    if logits.size(-1):
        largest.copy_(logits.detach().amax(-1, keepdim=True))
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    # A copy: the gradient of the loss may be written over the logits.
    exponentials = torch.exp(logits.float() - largest).sum(-1)
    total = reduce_from_tensor_model_parallel_region(exponentials)
    return (total.log() + largest.squeeze(-1)).square()
