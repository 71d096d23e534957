"""A small Llama folder with a tokenizer, which transformers and this program both open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint
from tests.support.prose import prose

VOCABULARY = 400
TEXT = "".join(prose(4))
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCABULARY,
    matrix_init_std=0.3,
    vector_init_std=1.0,
    input_mult=0.7,
    output_mult=1.3,
    mup=MupConfig(enabled=True, base_hidden_size=16),
)


def make_tokenizer(path: Path, text: str = TEXT) -> Tokenizer:
    """A tokenizer of VOCABULARY ids."""
    return train_tokenizer([text], path, VOCABULARY)


def make_folder(folder: Path) -> Path:
    """`folder`/tokenizer.model, and `folder`/llama: MODEL's weights as plain Llama, multipliers folded in."""
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    options = ExportOptions(flavour="llama", tokenizer=Path(tokenizer.path), sequence_length=64)
    write_hugging_face(InitialCheckpoint(MODEL, seed=3), MODEL, folder / "llama", options)
    return folder


def evaluated_in(folder: Path, model: ModelConfig = MODEL) -> EvaluatedCheckpoint:
    """The same weights as fresh ones of `model`, multipliers and all, with the folder's tokenizer."""
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    return EvaluatedCheckpoint(folder, InitialCheckpoint(model, seed=3), model, tokenizer, "fp32", 64)


def reference_model(folder: Path) -> Any:
    """The folder's Llama in transformers."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    # Not `from_pretrained`: first imported beside the engine's CPU adapter, it leaves rotary frequencies unset.
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "llama"))
    model.load_state_dict(load_file(folder / "llama" / "model.safetensors"))
    return model.float().eval()
