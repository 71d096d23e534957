"""A tokenizer as the files of a Hugging Face folder, which `AutoTokenizer` of `transformers` loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.data.tokenizer.neighbours import CONFIG, SPECIAL, TEMPLATE
from flm_megatron.json_text import JsonObject

SPACE_SYMBOL = "\u2581"  # what SentencePiece writes a space as


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; none where the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def settings(self) -> dict[str, int | None]:
        """As `config.json` and `generation_config.json` name them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, sequence_length: int) -> SpecialIds:
    """Write a tokenizer into `folder` with its `tokenizer_config.json`; returns its special ids.

    No token is added at the beginning or end of a text by default, but by a `tokenizer.json` that itself says so.

    Raises:
        RequestError: a tiktoken file has a pattern that `tokenizers` reads in another way.
    """
    if tokenizer.kind == "sentencepiece":
        config = _sentencepiece(folder, tokenizer)
    else:
        config = _tokenizer_json(folder, tokenizer)
    config["model_max_length"] = sequence_length
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    known = (number if number >= 0 else None for number in (tokenizer.bos, tokenizer.eod, tokenizer.pad))
    return SpecialIds(*known)


def _sentencepiece(folder: Path, tokenizer: Tokenizer) -> JsonObject:
    """Copy a SentencePiece model; returns its configuration."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files.data)
    special = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unk": processor.unk_id(),
        "pad": processor.pad_id(),
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.files.data)
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith(SPACE_SYMBOL),
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": processor.id_to_piece(number) for role, number in special.items() if number >= 0},
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }


def _tokenizer_json(folder: Path, tokenizer: Tokenizer) -> JsonObject:
    """Write a `tokenizer.json` and what belongs to it; returns its configuration, completed where it says too little.

    The bytes of a `tokenizer.json` are those of the source, so that its fingerprint stays.
    """
    from flm_megatron.data.tokenizer.from_tiktoken import tokenizer_json
    from flm_megatron.data.tokenizer.tiktoken import TiktokenTokenizer

    data = tokenizer_json(tokenizer).encode() if isinstance(tokenizer, TiktokenTokenizer) else tokenizer.files.data
    (folder / "tokenizer.json").write_bytes(data)
    for name in (SPECIAL, TEMPLATE):
        if (beside := tokenizer.files.beside(name)) is not None:
            (folder / name).write_bytes(beside)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    roles = {"bos": tokenizer.bos, "eos": tokenizer.eod, "pad": tokenizer.pad}
    config = tokenizer.files.json_beside(CONFIG)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.setdefault("clean_up_tokenization_spaces", False)
    for role, number in roles.items():
        if number in names and not config.get(f"{role}_token"):
            config[f"{role}_token"] = names[number]
    return config
