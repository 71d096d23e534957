"""What is recorded beside an indexed dataset, and whether the files on disk still agree with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path

from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.corpus.index_file import open_index
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import DamagedError, RequestError, read_error, refuse_together
from flm_megatron.json_text import parse_json
from flm_megatron.paths import FilePath
from flm_megatron.storage.cache.whole import file_at
from flm_megatron.storage.store import info
from flm_megatron.url import is_url

FORMAT = "flm_megatron indexed dataset"
VERSIONS = (1, 2)
"""The second is of datasets that were adopted, which it says."""
LARGEST_COUNT = 2**31 - 1
"""Documents of a dataset, and ids of a document: megatron-core counts both in 32 bits, and takes larger numbers of
documents modulo 2**32 without a word."""


@dataclass(frozen=True)
class Description:
    """An indexed dataset: what went into it (PREFIX.json)."""

    tokens: int
    """Ids in the .bin, end-of-document ids included."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    documents: int
    """Documents, none of them empty."""
    vocab_size: int
    """Ids of the tokenizer."""
    tokenizer: str
    """Fingerprint of the tokenizer: SHA-256 of its model file."""
    eod: int
    """Id that ends each document."""
    pad: int
    """Id of padding, which is not in the data."""
    bin_bytes: int
    """Size of the .bin file."""
    idx_bytes: int
    """Size of the .idx file."""
    sha256: str
    """Hash of the .bin file."""
    format: str = FORMAT
    version: int = VERSIONS[0]
    adopted: bool = False
    """Whether another program made it: then `text_bytes` is an estimate, documents need not end with `eod`, and the
    index may number some without text."""

    def to_bytes(self) -> bytes:
        """As JSON; what only adopted datasets have is left out of others."""
        fields = {name: value for name, value in asdict(self).items() if name != "adopted" or value}
        return (json.dumps(fields, indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_bytes(self.to_bytes())


def file_of(prefix: FilePath, suffix: str) -> Path:
    """PREFIX.bin, PREFIX.idx or PREFIX.json, of a dataset on this machine."""
    return Path(f"{os.fspath(prefix)}.{suffix}")


def member(prefix: FilePath, suffix: str) -> Path | str:
    """PREFIX.bin, PREFIX.idx or PREFIX.json: a path, or the URL of an object."""
    return f"{prefix}.{suffix}" if is_url(prefix) else file_of(prefix, suffix)


def size_of(prefix: FilePath, suffix: str) -> int | None:
    """Bytes of PREFIX.`suffix`; none if it is not there. Raises RequestError if its store fails."""
    name = member(prefix, suffix)
    if isinstance(name, Path):
        return name.stat().st_size if name.is_file() else None
    found = info(name)
    return found.size if found else None


def at_hand(prefix: FilePath, suffix: str) -> Path:
    """PREFIX.`suffix` as a file of this machine: itself, or the copy of an object. Raises as `file_at`; DamagedError if
    it is not there."""
    name = member(prefix, suffix)
    found = name if isinstance(name, Path) else file_at(name)
    if found is None:
        raise DamagedError(f"{name} is missing")
    return found


def read_description(prefix: FilePath) -> Description:
    """Read PREFIX.json and check that the .bin and .idx beside it are as they were written, and fit each other.

    Raises:
        RequestError: a file is missing, or it is of another version, or has more documents than can be numbered; or
            its disk does not answer.
        DamagedError: PREFIX.json cannot be read, a file has another size, or the index is not the .bin's.
    """
    sizes = {suffix: size_of(prefix, suffix) for suffix in ("json", "bin", "idx")}
    for suffix, size in sizes.items():
        if size is None:
            raise RequestError(f"dataset {prefix}: {member(prefix, suffix)} is missing; {_advice(prefix, sizes)}")
    description = _parse(at_hand(prefix, "json"))
    refuse_too_many(description.documents, prefix)
    for suffix, recorded in (("bin", description.bin_bytes), ("idx", description.idx_bytes)):
        if sizes[suffix] != recorded:
            raise DamagedError(
                f"{member(prefix, suffix)} has {sizes[suffix]} bytes but {recorded} were written: build it again"
            )
    _check_index(prefix, description)
    return description


def _advice(prefix: FilePath, sizes: Mapping[str, int | None]) -> str:
    """What to do about a dataset of which a file is missing."""
    if sizes["json"] is None and None not in (sizes["bin"], sizes["idx"]):
        return f"describe what another program made with `flm data adopt {prefix} --tokenizer TOKENIZER`"
    return "make it with `flm data build`"


def refuse_too_many(documents: int, prefix: FilePath) -> None:
    """Raise RequestError where a dataset has more documents than LARGEST_COUNT."""
    if documents > LARGEST_COUNT:
        raise RequestError(
            f"dataset {prefix} has {documents:,} documents, more than the {LARGEST_COUNT:,} that one can number:"
            " build several datasets from parts of the text, and name each of them in the run file"
        )


def _check_index(prefix: FilePath, description: Description) -> None:
    """Check that the index has the described documents and that the last one ends where the .bin does."""
    index = open_index(at_hand(prefix, "idx"), description.documents, description.adopted)
    if index.end != description.bin_bytes:
        raise DamagedError(
            f"{index.path} does not fit {member(prefix, 'bin')}, which has {description.documents:,} documents in"
            f" {description.bin_bytes:,} bytes: one of them is of another dataset; build it again"
        )


def _parse(path: Path) -> Description:
    try:
        fields = parse_json(path.read_bytes(), "it", strict=True)
        version = (fields["format"], fields["version"])
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} does not describe a dataset ({error}): build the dataset again") from None
    if version[0] != FORMAT or version[1] not in VERSIONS:
        raise RequestError(f"{path} is {version[0]!r} version {version[1]}, but {FORMAT!r} version 1 or 2 is needed")
    try:
        description = Description(**fields)
    except TypeError as error:
        raise DamagedError(f"{path} does not describe a dataset ({error}): build the dataset again") from None
    for field in dataclass_fields(Description):
        value, least = getattr(description, field.name), -1 if field.name == "pad" else 0
        if type(value).__name__ != field.type or (isinstance(value, int) and value < least):
            raise DamagedError(f"{path}: {field.name} is {value!r:.80}: build the dataset again")
    return description


def check_datasets(data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int | None = None) -> None:
    """Check every dataset of a run against its files, the run's tokenizer and the model's vocabulary.

    Needs no engine: it can run before any process is started.

    Raises:
        Mistakes: datasets that are missing, are shorter than one sample, were made with another tokenizer than
            `tokenizer` (or than the other datasets), or have ids that `vocab_size` does not hold.
        DamagedError: files do not agree with what was written.
    """
    sources = [*data.train, *data.validation]
    refuse_together(partial(_check_dataset, source, data, tokenizer, vocab_size) for source in sources)
    check_same_tokenizer(sources, [read_description(source.path) for source in sources])


def _check_dataset(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    """Check one dataset."""
    description = read_description(source.path)
    require_a_sample(source.path, description, data.sequence_length)
    if tokenizer and description.tokenizer != tokenizer.fingerprint:
        raise RequestError(
            f"dataset {source.path} was made with another tokenizer (fingerprint {description.tokenizer[:12]}) than"
            f" {tokenizer.path} (fingerprint {tokenizer.fingerprint[:12]}): give that tokenizer, or build it again"
        )
    if tokenizer and (description.vocab_size, description.eod, description.pad) != _ids_of(tokenizer):
        raise DamagedError(
            f"{member(source.path, 'json')} says {description.vocab_size} ids, end {description.eod} and padding"
            f" {description.pad}, but of its tokenizer these are {_ids_of(tokenizer)}: damaged; build it again"
        )
    if vocab_size is not None and description.vocab_size > vocab_size:
        raise RequestError(
            f"dataset {source.path} has ids up to {description.vocab_size - 1}, but the model's vocabulary is"
            f" {vocab_size}: set model.vocab_size to {description.vocab_size} or more, or leave it out"
        )


def _ids_of(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Number of ids, and those that end a document and pad."""
    return tokenizer.vocab_size, tokenizer.eod, tokenizer.pad


def require_a_sample(path: str, description: Description, sequence_length: int) -> None:
    """Check that a dataset has a sample of `sequence_length` tokens and the label after its last one.

    Raises:
        RequestError: it is shorter.
    """
    if description.tokens <= sequence_length:
        raise RequestError(
            f"dataset {path} has {description.tokens:,} tokens, too few for one sample of"
            f" {sequence_length} (and one more for the last label): shorten data.sequence_length or add text"
        )


def check_same_tokenizer(sources: Sequence[SourceConfig], descriptions: Sequence[Description]) -> None:
    """Check that all datasets were made with one tokenizer.

    Raises:
        RequestError: two were not; names both.
    """
    for source, description in zip(sources, descriptions, strict=True):
        if description.tokenizer != descriptions[0].tokenizer:
            raise RequestError(
                f"datasets {sources[0].path} and {source.path} were made with different tokenizers"
                f" (fingerprints {descriptions[0].tokenizer[:12]} and {description.tokenizer[:12]}): build one again"
            )
