"""Qwen 2 and 2.5: Llama's block with biases in queries, keys and values, and perhaps a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Values
from flm_megatron.checkpoint.hugging_face.families.llama import MODULES, decoder_settings
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, Heads, read_fields
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject


class QwenFields(DecoderFields):
    """The fields that determine the function of a Qwen 2 or 3, with the defaults of transformers' Qwen2Config."""

    num_key_value_heads: Heads | None = 32
    use_sliding_window: bool = False
    sliding_window: Annotated[int, Field(ge=1)] | None = 4096
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def window(self, where: str) -> int | None:
        """The window of all layers, none if they attend to everything.

        Raises RequestError where some layers have a window and others not, and where kinds of layers do not fit.
        """
        window = self.sliding_window if self.use_sliding_window else None
        slides = [window is not None and layer >= self.max_window_layers for layer in range(self.num_hidden_layers)]
        if self.layer_types is not None:
            slides = [kind == "sliding_attention" for kind in self.layer_types]
        if len(slides) != self.num_hidden_layers:
            raise RequestError(
                f"{where}: config.json has num_hidden_layers {self.num_hidden_layers} and layer_types for {len(slides)}"
            )
        if any(slides) and (window is None or not all(slides)):
            raise RequestError(
                f"{where}: config.json has a sliding window in {sum(slides)} of {len(slides)} layers, of "
                f"{window or 'no'} positions: one in all layers or in none is supported here"
            )
        return window if any(slides) else None


def qwen_settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    """What the `config.json` of a Qwen 2 or 3 says of `model`, without the name of the family."""
    window = model.sliding_window
    return decoder_settings(model, sequence_length) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers if window is None else 0,
    }


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, QwenFields, where)
    return ModelConfig(**fields.shape(), qkv_bias=True, sliding_window=fields.window(where))


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return qwen_settings(model, sequence_length) | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


EXPRESSES: Mapping[str, Values] = {
    "qkv_bias": (True,),
    "rope_scaling": None,
    "sliding_window": None,
    "tie_embeddings": None,
}
QWEN2 = Family("qwen2", MODULES, _model, _settings, EXPRESSES)
