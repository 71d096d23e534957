"""A corpus that needs no download: the sources of the running Python's own standard library, code and prose."""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.corpus.description import Description, read_description
from flm_megatron.data.corpus.statistics import UnigramEntropy, unigram_entropy
from flm_megatron.data.tokenizer import train_tokenizer
from flm_megatron.data.tokenizer.train_sentencepiece import FIXED_IDS
from flm_megatron.durable import make_folders, sync
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath, require_folder

# Tests repeat themselves, encodings are tables, and the rest is not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES = (".py", ".txt", ".rst")
HELD_OUT_EVERY = 20
# A file above this size is never held out: it would be most of the validation text, and unlike the rest.
HELD_OUT_BYTES = 100_000


@dataclass(frozen=True)
class StandardLibrary:
    """What `build_standard_library` made."""

    train: Description
    validation: Description
    entropy: UnigramEntropy


def standard_library_documents(max_bytes: int = 8_000_000) -> tuple[list[str], list[str]]:
    """Texts of training files and of held-out files.

    Files are taken in an order that follows from the hash of their path until there are `max_bytes`, and one in
    twenty of them is held out, so the same Python gives the same texts in the same order.

    Raises:
        RequestError: this Python has no standard library sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    used = 0
    for text in _texts(root):
        if used + len(text) > max_bytes:
            continue
        used += len(text)
        due = len(held_out) * HELD_OUT_EVERY <= len(train) + len(held_out) and len(text) <= HELD_OUT_BYTES
        (held_out if due else train).append(text.decode())
    if not train or not held_out:
        raise RequestError(f"no standard library sources for {max_bytes:,} bytes of text under {root}")
    return train, held_out


def _texts(root: Path) -> Iterator[bytes]:
    """UTF-8 text of each file, in the order of the hash of its path."""
    found = [path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in found}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        data = names[name].read_bytes()
        if data and not LEFT_OUT & set(Path(name).parts) and _is_utf8(data):
            yield data


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def build_standard_library(
    out: FilePath, *, vocab_size: int = 4096, max_bytes: int = 8_000_000, workers: int = 1
) -> StandardLibrary:
    """Write OUT/tokenizer.model and the datasets OUT/train and OUT/validation; the folder appears when it is whole.

    Raises:
        RequestError: `out` exists, or the text is too small for `vocab_size`.
    """
    out = Path(out)
    if out.exists():
        raise RequestError(f"{out} exists: choose another folder, or remove it first")
    require_folder(out, "folder")
    if vocab_size <= FIXED_IDS:
        raise RequestError(f"a vocabulary of {vocab_size} ids is too small: give more than {FIXED_IDS}")
    parts = dict(zip(("train", "validation"), standard_library_documents(max_bytes), strict=True))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make_folders(partial)
    try:
        tokenizer = train_tokenizer(parts["train"], partial / "tokenizer.model", vocab_size)
        for name, texts in parts.items():
            size = sum(len(text.encode()) for text in texts)
            build_dataset(texts, tokenizer, partial / name, workers=workers, total_bytes=size)
        entropy = unigram_entropy(partial / "train", partial / "validation")
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StandardLibrary(read_description(out / "train"), read_description(out / "validation"), entropy)
