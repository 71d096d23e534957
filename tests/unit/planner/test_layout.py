"""Sizes per rank, held against the regions of the same layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.config.schema import LoraConfig, ModelConfig, ParallelConfig
from flm_megatron.planner.layout import Workload

# A vocabulary without padding.
MODEL = ModelConfig(
    num_layers=6, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, vocab_size=512
)
BLOCKS = {
    "tele-flm": MODEL,
    "flm-101b": replace(MODEL, normalization="layernorm", activation="gelu", bias=True),
    "adapters": replace(MODEL, lora=LoraConfig(rank=3)),
    "two adapters": replace(MODEL, lora=LoraConfig(rank=3, targets=["projection", "fc1"]), bias=True),
}


@pytest.mark.parametrize("block", sorted(BLOCKS))
@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (2, 1, 1), (4, 3, 1), (2, 2, 3)])
def test_a_rank_has_as_many_parameters_as_its_regions(block: str, tensor: int, pipeline: int, virtual: int) -> None:
    model = BLOCKS[block]
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    work = Workload(model, 16, 8, 1, parallel, data=1)
    for rank in range(pipeline):
        for tensor_rank in range(tensor):
            held = rank_regions(model, parallel, tensor_rank, rank).values()
            assert work.rank_parameters(rank) == sum(region.numel for regions in held for region in regions)
