"""Configuration of Tele-FLM: Llama's, with the scalar multipliers of its muP parametrization."""

from typing import Any, Optional

from transformers.models.llama.configuration_llama import LlamaConfig


class TeleFLMConfig(LlamaConfig):
    """Llama's configuration and four numbers.

    `input_mult` multiplies the embeddings; `output_mult / mup_scale_factor` multiplies the final hidden state before
    the head; both only with `use_mup`. Ids from `true_vocab_size` on are padding and never predicted.
    """

    model_type = "teleflm"

    def __init__(
        self,
        use_mup: bool = True,
        mup_scale_factor: float = 1.0,
        input_mult: float = 1.0,
        output_mult: float = 1.0,
        true_vocab_size: Optional[int] = None,  # noqa: UP045 (transformers runs on Python 3.9 too)
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.use_mup = use_mup
        self.mup_scale_factor = mup_scale_factor
        self.input_mult = input_mult
        self.output_mult = output_mult
        self.true_vocab_size = true_vocab_size or self.vocab_size

    @property
    def embedding_multiplier(self) -> float:
        """Factor on the embeddings."""
        return self.input_mult if self.use_mup else 1.0

    @property
    def logit_multiplier(self) -> float:
        """Factor on the final hidden state before the head."""
        return self.output_mult / self.mup_scale_factor if self.use_mup else 1.0
