"""Small conversations, and a tokenizer for them, for tests of fine-tuning."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

TEXT = "add two numbers and return the sum of them or none if one is not a number at all then stop"
WORDS = TEXT.split()


def conversation(number: int, turns: int | None = None) -> dict[str, Any]:
    """A conversation of one to three turns, every second one with a system message."""
    draw = random.Random(number)
    messages = [{"role": "system", "content": f"be {draw.choice(WORDS)}"}] if number % 2 else []
    for turn in range(turns or draw.randint(1, 3)):
        messages.append(
            {"role": "user", "content": f"q{number}.{turn} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))}
        )
        messages.append({"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))})
    return {"messages": messages}


def write(path: Path, records: list[Any]) -> Path:
    """A JSONL file of `records`; text and bytes are written as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of 320 ids over the words above, in `folder`."""
    path = folder / "tokenizer.model"
    return open_tokenizer(path) if path.exists() else train_tokenizer([TEXT] * 20, path, 290)
