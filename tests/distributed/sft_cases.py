"""A tokenizer, conversations and a checkpoint to fine-tune, for tests."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.initial import InitialCheckpoint
from flm_megatron.checkpoint.writer import write_view
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from tests.unit.chat_cases import conversation, tokenizer, write

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=290
)
SEED = 5


def chat_folder(folder: Path) -> Path:
    """`tokenizer.model`, 24 conversations in `chat.jsonl`, and fresh weights of MODEL in `base`."""
    model = tokenizer(folder)
    write(folder / "chat.jsonl", [conversation(i) for i in range(24)])
    stages = [StageConfig(name="base", model=MODEL, tokens=1)]
    run = RunConfig(tokenizer=model.path, data=DataConfig(sequence_length=512), stages=stages)
    known = dict.fromkeys(("step", "tokens", "samples", "optimizer_step"), 0)
    view = InitialCheckpoint(MODEL, SEED)
    write_view(view, folder / "base", {"run": run_to_dict(run), "stage": "base", **known})
    return folder
