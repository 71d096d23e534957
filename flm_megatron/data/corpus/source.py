"""One indexed dataset cut into samples by megatron-core; in which order they are taken is `source_line`'s."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus.description import Description, at_hand, member, read_description, require_a_sample
from flm_megatron.durable import make_folders, sync, sync_tree
from flm_megatron.engine.datasets import (
    IndexedDataset,
    SampleIndex,
    open_indexed,
    open_indexed_at,
    sample_index,
    save_index,
)
from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.storage.cache.blocks import BlockReader
from flm_megatron.storage.cache.place import cache_root
from flm_megatron.storage.store import info
from flm_megatron.url import is_url

if TYPE_CHECKING:
    import torch

WHOLE = "whole"
NPY_MAGIC = b"\x93NUMPY"
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class Source:
    """Samples of one dataset.

    megatron-core's GPTDataset is built for exactly one pass, so that what a sample holds never depends on how many
    are asked for: the documents are shuffled by `seed`, laid end to end, which is the same line of ids for every
    length, and cut every `sequence_length` ids (what is over at the end is left out).
    """

    def __init__(self, config: SourceConfig, sequence_length: int, seed: int, cache: str | None) -> None:
        """Open the dataset, building its sample index under `cache` (or beside it) if it is not there yet.

        Raises:
            RequestError: the dataset is missing or smaller than one sample, or the cache cannot be written.
            DamagedError: its files do not agree with what was written.
        """
        self.name, self.sequence_length = config.display_name, sequence_length
        self.description = read_description(config.path)
        require_a_sample(config.path, self.description, sequence_length)
        self._dataset, self._blocks = _open(config.path, self.description, sequence_length, seed, cache)

    def __len__(self) -> int:
        """Samples in one pass."""
        return len(self._dataset)

    def read(self, sample: int) -> dict[str, torch.Tensor]:
        """Sample `sample` of a pass: `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, [sequence]."""
        item = self._dataset[sample]
        return {field: item[field] for field in FIELDS}

    def row(self, sample: int) -> int:
        """The position of sample `sample` on the line of documents: its ids begin at `row * sequence_length`."""
        return int(self._dataset.shuffle_index[sample])

    def rows(self, samples: numpy.ndarray) -> numpy.ndarray:
        """The rows of many samples, [n]."""
        return self._dataset.shuffle_index[samples]

    def text(self, start: int, count: int) -> numpy.ndarray:
        """`count` ids of the line of documents from `start` on, int64 [count]; the line must be long enough."""
        parts = [self._dataset.dataset.get(*stretch) for stretch in self._stretches(start, count)]
        return numpy.concatenate(parts).astype(numpy.int64)

    def documents(self, start: int, count: int) -> list[int]:
        """Numbers in the dataset of the documents that `count` ids from place `start` on are taken from, in order."""
        return [document for document, _, _ in self._stretches(start, count)]

    @property
    def is_remote(self) -> bool:
        """Whether its ids lie in a store."""
        return self._blocks is not None

    def want(self, start: int, count: int) -> None:
        """Have `count` ids of the line of documents from `start` on brought here in the background, from a store."""
        if self._blocks is not None:
            index = self._dataset.dataset.index
            size = numpy.dtype(index.dtype).itemsize
            for document, offset, length in self._stretches(start, count):
                first = int(index.sequence_pointers[document]) + offset * size
                self._blocks.want(first, first + length * size)

    def _stretches(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(document, first id in it, number of ids) of each stretch of the line that makes up the given range."""
        row, skipped = divmod(start, self.sequence_length)
        place, offset = map(int, self._dataset.sample_index[row])
        offset += skipped
        while count > 0:
            document = int(self._dataset.document_index[place])
            length = int(self._dataset.dataset.sequence_lengths[document])
            if offset < length:
                taken = min(count, length - offset)
                yield document, offset, taken
                count -= taken
            place, offset = place + 1, max(0, offset - length)


def _open(
    prefix: str, description: Description, length: int, seed: int, cache: str | None
) -> tuple[SampleIndex, BlockReader | None]:
    """The samples, and what reads their ids if those lie in a store."""
    blocks = _blocks(prefix) if is_url(prefix) else None
    indexed = open_indexed(prefix) if blocks is None else open_indexed_at(at_hand(prefix, "idx"), blocks)
    key = f"{description.sha256}/{description.eod}/{description.pad}/{length}/{seed}"
    folder = _cache_root(prefix, cache) / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (folder / WHOLE).exists():
        _build_index(indexed, description, length, seed, folder)
    return _load(indexed, description, length, seed, folder), blocks


def _blocks(prefix: str) -> BlockReader:
    url = str(member(prefix, "bin"))
    found = info(url)
    if found is None:
        raise RequestError(f"{url} was removed while it was read: bring it back")
    return BlockReader(found)


def _load(indexed: IndexedDataset, description: Description, length: int, seed: int, folder: Path) -> SampleIndex:
    """Open a built index. numpy would unpickle a file that is not an array, which can run code: only arrays pass."""
    try:
        for path in folder.glob("*.npy"):
            with path.open("rb") as file:
                if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
                    raise ValueError(f"{path.name} is not an array")
        return _sample_index(indexed, description, length, seed, str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(
            f"sample index {folder} cannot be read ({error}): remove that folder, and it is built again"
        ) from None
    except OSError as error:
        raise read_error(folder, error) from error


def _cache_root(prefix: str, cache: str | None) -> Path:
    if cache:
        return Path(cache)
    if not is_url(prefix):
        return Path(f"{prefix}_cache")
    return cache_root() / "samples"


def _build_index(indexed: IndexedDataset, description: Description, length: int, seed: int, folder: Path) -> None:
    """Build the index in a folder of our own, then rename it into place.

    Processes that come at the same time on one machine wait for the first one; wherever locks do not reach (some
    network disks), each builds and the first to finish stays. Both are safe: all of them build the same files.
    """
    from filelock import FileLock

    partial = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        make_folders(folder.parent)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if (folder / WHOLE).exists():
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_index(_sample_index(indexed, description, length, seed, ""), partial)
            (partial / WHOLE).touch()
            sync_tree(partial)
            partial.rename(folder)
            sync(folder.parent)
    except OSError as error:
        if not (folder / WHOLE).exists():
            raise RequestError(
                f"cannot write sample indices: {error}; set data.cache to a folder with room that can be written"
            ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sample_index(
    indexed: IndexedDataset, description: Description, length: int, seed: int, folder: str
) -> SampleIndex:
    """The samples with the index in `folder`; without a folder it is built in memory."""
    ids = {"eod": description.eod, "pad": description.pad, "vocab_size": description.vocab_size}
    # The hash stands for the path: a dataset that is moved keeps its indices.
    return sample_index(indexed, description.sha256, length, seed % 2**32, folder, ids)
