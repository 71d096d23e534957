"""Small texts, tokenizers and datasets for tests of the data room."""

from __future__ import annotations

import random
from pathlib import Path

from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.tokenizer import Tokenizer, train_tokenizer

WORDS = "if the tensor of every layer is split along its rows then no rank holds all of it and the sum is one"


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` different documents of 20 to 120 words."""
    generator = random.Random(seed)
    return [
        f"{seed}.{i}: " + " ".join(generator.choices(WORDS.split(), k=generator.randint(20, 120))) + "\n"
        for i in range(count)
    ]


def tokenizer(folder: Path, vocab_size: int = 320) -> Tokenizer:
    """A tokenizer of `vocab_size` ids over the words above, in `folder`."""
    return train_tokenizer(texts(40), folder / f"tokenizer_{vocab_size}.model", vocab_size)


def datasets(folder: Path, counts: dict[str, int]) -> Tokenizer:
    """A dataset FOLDER/NAME of so many documents for each name; gives their tokenizer."""
    model = tokenizer(folder)
    for number, (name, count) in enumerate(counts.items()):
        build_dataset(texts(count, seed=number), model, folder / name)
    return model


def sources(folder: Path, weights: dict[str, float], epochs: bool = False) -> list[SourceConfig]:
    """Sources FOLDER/NAME with weights, or with epochs."""
    if epochs:
        return [SourceConfig(path=str(folder / name), epochs=value) for name, value in weights.items()]
    return [SourceConfig(path=str(folder / name), weight=value) for name, value in weights.items()]


def config(folder: Path, weights: dict[str, float], epochs: bool = False, sequence_length: int = 32) -> DataConfig:
    """A run's training data over those sources."""
    return DataConfig(sequence_length=sequence_length, train=sources(folder, weights, epochs))
