"""Layers over model chunks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError


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
        (3, {"pipeline": 4}, "3 layers cannot be split into 4 model chunks (pipeline 4 x virtual_pipeline 1)"),
        (3, {"pipeline": 2, "virtual_pipeline": 2}, "3 layers cannot be split into 4 model chunks"),
        (8, {"virtual_pipeline": 2}, "virtual_pipeline 2 needs a pipeline of at least 2, not 1"),
        (4, {"pipeline": 2, "pipeline_layers": [4]}, "[4] has 1 numbers, but pipeline 2 x virtual_pipeline 1 makes 2"),
        (4, {"pipeline": 2, "pipeline_layers": [1, 2]}, "[1, 2] adds up to 3, but the model has 4 layers"),
        (4, {"pipeline": 2, "pipeline_layers": [4, 0]}, "[4, 0] leaves a model chunk without a layer"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_values(layers: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        pipeline_split(layers, ParallelConfig(**fields))
