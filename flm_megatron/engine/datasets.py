"""Indexed datasets (PREFIX.bin, PREFIX.idx) and their samples: megatron-core's; imports the engine when called."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import numpy

from flm_megatron.engine.prepare import prepare

if TYPE_CHECKING:
    import torch


class Bytes(Protocol):
    """Something of which ranges of bytes can be read."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        ...


class DocumentIndex(Protocol):
    """Where documents lie."""

    dtype: type[numpy.number]
    sequence_pointers: numpy.ndarray
    """Place of each document in the .bin, in bytes."""


class IndexedDataset(Protocol):
    """Documents of token ids."""

    index: DocumentIndex

    sequence_lengths: numpy.ndarray
    """Length of each document."""

    def __len__(self) -> int: ...

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """Ids of document `idx`, from `offset` on."""
        ...


class SampleIndex(Protocol):
    """megatron-core's GPTDataset: documents shuffled, laid end to end and cut into samples."""

    dataset: IndexedDataset
    document_index: numpy.ndarray
    sample_index: numpy.ndarray
    shuffle_index: numpy.ndarray
    unique_description: str
    unique_description_hash: str

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]: ...


def open_indexed(prefix: str) -> IndexedDataset:
    """The documents of PREFIX.bin."""
    prepare()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset.IndexedDataset(prefix)


class _IdReader:
    """megatron-core's reader of a .bin, out of ranges of bytes from anywhere.

    Its own for object stores keeps one block of 256 MiB in memory, which samples in random order would fetch anew for
    every document; it asks S3 alone, tries nothing again, and takes a cached index for that of whatever is there now.
    """

    def __init__(self, ids: Bytes) -> None:
        self._ids = ids

    def read(self, dtype: type[numpy.number], count: int, offset: int) -> numpy.ndarray:
        """`count` ids from byte `offset` on."""
        size = numpy.dtype(dtype).itemsize
        return numpy.frombuffer(self._ids.read(int(offset), int(offset) + int(count) * size), dtype=dtype)


def open_indexed_at(idx_path: Path, ids: Bytes) -> IndexedDataset:
    """The documents of an index file of this machine, whose ids `ids` reads."""
    prepare()
    from megatron.core.datasets import indexed_dataset

    dataset: indexed_dataset.IndexedDataset = object.__new__(indexed_dataset.IndexedDataset)
    dataset.bin_reader = _IdReader(ids)
    dataset.index = indexed_dataset._IndexReader(str(idx_path), False)
    return dataset


def sample_index(
    indexed: IndexedDataset, name: str, sequence_length: int, seed: int, folder: str, ids: dict[str, int]
) -> SampleIndex:
    """The samples of one pass, their index read from `folder`; without a folder it is built in memory.

    `name` stands for the dataset in the names of the index files; `ids` are the tokenizer's `eod`, `pad` and
    `vocab_size`.
    """
    prepare()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([name], None), None, None],
        path_to_cache=folder,
        tokenizer=SimpleNamespace(**ids, unique_identifiers=ids),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # It warns that an index without a folder is not saved.
    logging.getLogger(GPTDataset.__module__).setLevel(logging.ERROR)
    documents = numpy.arange(len(indexed), dtype=numpy.int32)
    return GPTDataset(indexed, name, documents, None, Split.train, config)


def save_index(dataset: SampleIndex, folder: Path) -> None:
    """Write an index under the names that `sample_index` looks for.

    Its own saving is left to the process of rank 0 of the run, which need not be on this machine.
    """
    split = dataset.index_split.name  # type: ignore[attr-defined]
    base = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}"
    for affix in ("document_index", "sample_index", "shuffle_index"):
        numpy.save(folder / f"{base}-{affix}.npy", getattr(dataset, affix))
    (folder / f"{base}-description.txt").write_text(dataset.unique_description)
