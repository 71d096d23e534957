"""Verifies a dataset: its index in a moment, its ids by reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus.description import Description, at_hand, member, read_description
from flm_megatron.data.corpus.index_file import open_index
from flm_megatron.errors import DamagedError, read_error
from flm_megatron.paths import FilePath
from flm_megatron.storage.store import read_range

BLOCK = 8 * 2**20


def check_indices(sources: Sequence[SourceConfig]) -> None:
    """Check every entry of every source's index. Raises as `verify_index`."""
    for source in sources:
        verify_index(source.path)


def verify_index(prefix: FilePath) -> Description:
    """Check a dataset's description and every entry of its index; returns the description.

    Raises:
        RequestError: as `read_description`.
        DamagedError: a file is not as it was written; the message names it.
    """
    description = read_description(prefix)
    index = open_index(at_hand(prefix, "idx"), description.documents, description.adopted)
    index.check()
    if description.tokens * index.id_bytes != description.bin_bytes:
        raise DamagedError(
            f"{member(prefix, 'json')} says {description.tokens:,} tokens of {index.id_bytes} bytes in"
            f" {description.bin_bytes:,}: damaged; build the dataset again"
        )
    return description


def verify_dataset(prefix: FilePath, progress: Callable[[int], object] | None = None) -> Description:
    """Check a dataset as `verify_index` and by the hash of all its ids; returns its description.

    `progress` is called with the bytes read since its last call. Raises as `verify_index`; RequestError too when the
    disk does not answer.
    """
    description = verify_index(prefix)
    found = hashlib.sha256()
    for data in _ids(prefix, description.bin_bytes):
        found.update(data)
        if progress:
            progress(len(data))
    if found.hexdigest() != description.sha256:
        name = member(prefix, "bin")
        raise DamagedError(f"{name}: its ids are not those that were written: bring it back, or build it again")
    return description


def _ids(prefix: FilePath, size: int) -> Iterator[bytes]:
    """The bytes of a .bin, which has `size` of them, in order; those of an object are not kept here."""
    path = member(prefix, "bin")
    if not isinstance(path, Path):
        yield from (read_range(path, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
        return
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(BLOCK):
                yield data
    except OSError as error:
        raise read_error(path, error) from error
