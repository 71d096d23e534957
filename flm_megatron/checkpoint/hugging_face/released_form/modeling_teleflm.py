"""Tele-FLM for `transformers`: Llama's decoder, with a factor on the embeddings and one before the head."""

from typing import Optional

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from .configuration_teleflm import TeleFLMConfig


class ScaledEmbedding(nn.Embedding):
    """An embedding whose output [..., hidden] is multiplied by `multiplier`."""

    multiplier: float = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embeddings of ids [...], scaled."""
        return super().forward(input) * self.multiplier


class ScaledHead(nn.Linear):
    """A language-model head that scales its input and never predicts padding ids."""

    multiplier: float = 1.0
    true_vocab_size: Optional[int] = None  # noqa: UP045 (transformers runs on Python 3.9 too)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]; minus infinity for padding ids."""
        logits = super().forward(input * self.multiplier)
        if self.true_vocab_size is not None and self.true_vocab_size < self.out_features:
            logits[..., self.true_vocab_size :] = float("-inf")
        return logits


class TeleFLMModel(LlamaModel):
    """Llama's decoder with scaled embeddings."""

    config_class = TeleFLMConfig

    def __init__(self, config: TeleFLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_tokens.multiplier = config.embedding_multiplier
        self.post_init()


class TeleFLMForCausalLM(LlamaForCausalLM):
    """Tele-FLM with its language-model head."""

    config_class = TeleFLMConfig

    def __init__(self, config: TeleFLMConfig) -> None:
        super().__init__(config)
        self.model = TeleFLMModel(config)
        self.lm_head = ScaledHead(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.multiplier = config.logit_multiplier
        self.lm_head.true_vocab_size = config.true_vocab_size
        self.post_init()
