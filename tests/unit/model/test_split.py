"""Layers over pipeline parts, and the padded vocabulary."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.split import padded_vocab_size, pipeline_split


@pytest.mark.parametrize(("tensor", "padded"), [(1, 80_000), (4, 80_384), (8, 80_896), (16, 81_920), (32, 81_920)])
def test_padded_vocabulary_is_as_in_the_releases(tensor: int, padded: int) -> None:
    assert padded_vocab_size(80_000, tensor) == padded


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_padding_is_the_least_that_splits(vocab: int, tensor: int) -> None:
    padded = padded_vocab_size(vocab, tensor)
    assert padded % (128 * tensor) == 0
    assert vocab <= padded < vocab + 128 * tensor


@pytest.mark.parametrize(
    ("layers", "parallel", "expected"),
    [
        (4, ParallelConfig(), [4]),
        (64, ParallelConfig(pipeline=2), [32, 32]),
        (5, ParallelConfig(pipeline=2), [3, 2]),
        (140, ParallelConfig(pipeline=28), [5] * 28),
        (7, ParallelConfig(pipeline=2, virtual_pipeline=2), [2, 2, 2, 1]),
        (5, ParallelConfig(pipeline=2, pipeline_layers=[1, 4]), [1, 4]),
    ],
)
def test_layers_are_split_evenly_or_as_told(layers: int, parallel: ParallelConfig, expected: list[int]) -> None:
    assert pipeline_split(layers, parallel) == expected


@pytest.mark.parametrize(
    ("layers", "fields", "message"),
    [
        (3, {"pipeline": 4}, "3 layers cannot be split into 4 parts (pipeline 4 x virtual_pipeline 1)"),
        (3, {"pipeline": 2, "virtual_pipeline": 2}, "3 layers cannot be split into 4 parts"),
        (8, {"virtual_pipeline": 2}, "virtual_pipeline 2 needs a pipeline of at least 2, not 1"),
        (4, {"pipeline": 2, "pipeline_layers": [4]}, "[4] has 1 numbers, but pipeline 2 x virtual_pipeline 1 makes 2"),
        (4, {"pipeline": 2, "pipeline_layers": [1, 2]}, "[1, 2] adds up to 3, but the model has 4 layers"),
        (4, {"pipeline": 2, "pipeline_layers": [4, 0]}, "[4, 0] leaves a part without a layer"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_values(layers: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        pipeline_split(layers, ParallelConfig(**fields))
