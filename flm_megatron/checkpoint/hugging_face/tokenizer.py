"""A SentencePiece model as the tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.errors import RequestError

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


def write_tokenizer(folder: Path, model_file: Path, sequence_length: int) -> SpecialIds:
    """Copy the SentencePiece model into `folder` with its `tokenizer_config.json`; returns its special ids.

    No token is added at the beginning or end of a text by default. Raises RequestError if the file cannot be read.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{model_file} is not a SentencePiece model: {error}") from error
    special = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unk": processor.unk_id(),
        "pad": processor.pad_id(),
    }
    known = {kind: number for kind, number in special.items() if number >= 0}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith(SPACE_SYMBOL),
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        **{f"{kind}_token": processor.id_to_piece(number) for kind, number in known.items()},
    }
    shutil.copyfile(model_file, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return SpecialIds(known.get("bos"), known.get("eos"), known.get("pad"))
