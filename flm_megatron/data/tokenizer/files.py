"""The file of a tokenizer and those beside it, in a folder of this machine or at a URL."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Literal

from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.json_text import JsonObject, parse_json
from flm_megatron.paths import FilePath
from flm_megatron.storage.cache.whole import file_at
from flm_megatron.url import is_url, join, name_of

NAMES = ("tokenizer.json", "tokenizer.model")
"""Names that a tokenizer has in a folder of its own or of a model, the first that is there."""
TIKTOKEN = ".tiktoken"
Kind = Literal["sentencepiece", "hugging_face", "tiktoken"]
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


class TokenizerFiles:
    """A tokenizer's file: `path` as errors name it, `data` its bytes; and what lies beside it."""

    def __init__(self, path: FilePath) -> None:
        """Read the tokenizer at `path`: a file, or a folder that holds one.

        Raises:
            RequestError: it is not there, or cannot be read.
        """
        self.path, file = _found(path)
        self.name = name_of(self.path)
        try:
            self.data = file.read_bytes()
        except OSError as error:
            raise read_error(file, error) from error

    @cached_property
    def kind(self) -> Kind:
        """Which kind of tokenizer it looks like, from its beginning; whatever is of no other kind is SentencePiece."""
        if self.data.lstrip()[:1] == b"{":
            return "hugging_face"
        return "tiktoken" if _RANK_LINE.match(self.data) else "sentencepiece"

    @cached_property
    def fingerprint(self) -> str:
        """The tokenizer's identity: SHA-256 of its file; of a tiktoken file with what its description says of ids."""
        hashed = hashlib.sha256(self.data)
        if self.kind == "tiktoken":
            said = self.json_beside(self.description)
            hashed.update(json.dumps([said.get("pattern"), said.get("special_tokens")], sort_keys=True).encode())
        return hashed.hexdigest()

    @property
    def description(self) -> str:
        """The name of the file that describes a tiktoken file: FILE.json beside FILE."""
        return f"{self.name}.json"

    def place(self, name: str) -> FilePath:
        """The path or URL of the file `name` beside it, whether it is there or not."""
        if is_url(self.path):
            return join(self.path.rpartition("/")[0], name)
        return Path(self.path).with_name(name)

    def beside(self, name: str) -> bytes | None:
        """The bytes of the file `name` beside it; none if it is not there. Raises RequestError if it cannot be read."""
        file = file_at(self.place(name))
        try:
            return file.read_bytes() if file else None
        except OSError as error:
            raise read_error(Path(self.place(name)), error) from error

    def json_beside(self, name: str) -> JsonObject:
        """The JSON object of the file `name` beside it; an empty one if it is not there. Raises DamagedError."""
        data = self.beside(name)
        found = {} if data is None else parse_json(data, str(self.place(name)), DamagedError)
        if not isinstance(found, dict):
            raise DamagedError(f"{self.place(name)} is not a JSON object")
        return found


def tokenizer_exists(path: FilePath) -> bool:
    """Whether something may be a tokenizer at `path`; nothing of a store is asked for a URL."""
    return is_url(path) or Path(path).exists()


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer in a folder that may hold other things as well; none if there is none."""
    if not folder.is_dir():
        return None
    ranks = sorted(entry for entry in folder.iterdir() if entry.suffix == TIKTOKEN)
    return next(iter([*(folder / name for name in NAMES if (folder / name).is_file()), *ranks]), None)


def _found(path: FilePath) -> tuple[str, Path]:
    """What the tokenizer at `path` is called, and its file on this machine."""
    if not is_url(path) and Path(path).is_dir():
        within = tokenizer_in(Path(path))
        if within is None:
            raise RequestError(
                f"tokenizer {path}: the folder holds neither {', nor '.join(NAMES)}, nor a *{TIKTOKEN} file"
            )
        return str(within), within
    places = [str(path), *(join(str(path), name) for name in NAMES if is_url(path))]
    for place in places:
        if file := file_at(place):
            return place, file
    raise RequestError(f"tokenizer {path} is not there: train one with `flm data tokenizer`")
