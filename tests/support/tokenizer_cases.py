"""Tokenizers of every kind over the same text, and texts that are hard to take apart."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer
from tests.support.prose import prose

END, START, TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TORTURE = [
    "",
    " ",
    "plain words and more",
    "a  b\t\tc\r\nd\n\n\n  e",
    "日本語と中文 mixed 한국어",
    "👩‍👩‍👧‍👦 e\u0301 \u200d\ufeff \u2581 \u0000 \x7f",
    "def f(x):\n\treturn {**x, 'a': [1, 2_000]}  # 12345678\n",
    "\ud7ff\ue000\U0010ffff",
    f"text with {END} and {START}user{TURN} <s></s>[SEP] <|im_end",
    "x" * 3000 + " " * 3000 + "é" * 3000,
    "IT'S don't 1234567 ½ Ⅷ",
]


def hugging_face(
    folder: Path,
    template: str | None = CHATML,
    eos: str | None = END,
    special: Sequence[str] = (END, START, TURN),
    bos: str | None = None,
) -> Tokenizer:
    """`folder`/tokenizer.json, a byte-level BPE of about 400 ids, with its `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(prose(20), trainer)
    built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": bos,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    return open_tokenizer(folder / "tokenizer.json")


def ranks() -> dict[bytes, int]:
    """Ranks of all bytes and of a few pairs and triples of them."""
    found = {bytes([number]): number for number in range(256)}
    for token in (b"th", b"the", b" the", b"in", b"er", b"\xe6\x97", b"\xe6\x97\xa5", b"  ", b"12", b"123"):
        found[token] = len(found)
    return found


def tiktoken_file(folder: Path, described: bool = True) -> Path:
    """`folder`/small.tiktoken, with or without the file that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items()))
    if described:
        special = {END: 300, START: 301, TURN: 302}
        description = {"pattern": PATTERN, "special_tokens": special, "eos": END}
        file.with_name("small.tiktoken.json").write_text(json.dumps(description))
    return file
