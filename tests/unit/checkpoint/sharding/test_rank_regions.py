"""What each tensor-parallel rank holds of each matrix, written out by hand."""

from __future__ import annotations

import pytest

from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.config.schema import LoraConfig, ModelConfig, ParallelConfig

# Query groups of 2 queries, a key and a value of 4 channels: 16 rows a group, 64 in all.
GATED = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=24, num_attention_heads=8, num_query_groups=4, vocab_size=200
)
PLAIN = ModelConfig(**{**vars(GATED), "activation": "gelu", "bias": True})
TENSOR_2 = ParallelConfig(tensor=2)
LAYERS = "decoder.layers."


def rows(model: ModelConfig, name: str, rank: int) -> list[tuple[int, int]]:
    """First row and number of rows of each region of a stacked tensor."""
    return [(r.offsets[1], r.sizes[1]) for r in rank_regions(model, TENSOR_2, rank, 0)[LAYERS + name]]


@pytest.mark.parametrize(
    ("model", "name", "first", "second"),
    [
        (GATED, "mlp.linear_fc1.weight", [(0, 12), (24, 12)], [(12, 12), (36, 12)]),  # gate rows, then up rows
        (PLAIN, "mlp.linear_fc1.weight", [(0, 12)], [(12, 12)]),
        (PLAIN, "mlp.linear_fc1.bias", [(0, 12)], [(12, 12)]),
        (GATED, "self_attention.linear_qkv.weight", [(0, 32)], [(32, 32)]),
        (GATED, "self_attention.linear_qkv.layer_norm_weight", [(0, 32)], [(0, 32)]),
        (GATED, "mlp.linear_fc2.weight", [(0, 32)], [(0, 32)]),  # cut by columns
        (PLAIN, "mlp.linear_fc2.bias", [(0, 32)], [(0, 32)]),
    ],
)
def test_rows(model: ModelConfig, name: str, first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    assert rows(model, name, 0) == first and rows(model, name, 1) == second


@pytest.mark.parametrize(("name", "width"), [("self_attention.linear_proj.weight", 32), ("mlp.linear_fc2.weight", 24)])
def test_columns(name: str, width: int) -> None:
    for rank in (0, 1):
        (region,) = rank_regions(GATED, TENSOR_2, rank, 0)[LAYERS + name]
        assert (region.offsets[2], region.sizes[2]) == (rank * width // 2, width // 2)


def test_adapters_are_cut_as_the_matrices_are() -> None:
    model = ModelConfig(**{**vars(GATED), "lora": LoraConfig(rank=3)})
    fc1_b = rank_regions(model, TENSOR_2, 1, 0)[LAYERS + "mlp.linear_fc1.lora_b"]
    assert [(r.offsets[1:], r.sizes[1:]) for r in fc1_b] == [((12, 0), (12, 3)), ((36, 0), (12, 3))]
    (fc2_a,) = rank_regions(model, TENSOR_2, 1, 0)[LAYERS + "mlp.linear_fc2.lora_a"]
    assert (fc2_a.offsets, fc2_a.sizes) == ((0, 0, 12), (4, 3, 12))


def test_rows_of_vocabulary_padding_are_nobodys() -> None:
    """200 ids are padded to 256: the second of two ranks has 72 of its 128 rows."""
    name = "embedding.word_embeddings.weight"
    found = [rank_regions(GATED, TENSOR_2, rank, 0)[name][0] for rank in (0, 1)]
    assert [(r.offsets[0], r.sizes[0]) for r in found] == [(0, 128), (128, 72)]


def test_layers_of_an_uneven_interleaved_pipeline() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=1, pipeline_layers=[3, 1])
    name = LAYERS + "mlp.linear_fc2.weight"
    found = [rank_regions(GATED, parallel, 0, rank)[name] for rank in (0, 1)]
    assert [[(r.offsets[0], r.sizes[0]) for r in each] for each in found] == [[(0, 3)], [(3, 1)]]
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert [r.offsets[0] for r in rank_regions(GATED, interleaved, 0, 1)[name]] == [1, 3]
