"""Regions of layouts: they cover every tensor once, and a rank's own are the same bits as the whole's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.checkpoint.tools.reshard import reshard
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.config.presets import load_preset
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import EMBEDDING, HEAD, parameter_count, parameter_specs

REPLICATED = "norm"


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, ParallelConfig]:
    """A model and a layout that it can be split over."""
    tensor, pipeline = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 4))
    virtual = draw(st.integers(1, 2)) if pipeline > 1 else 1
    groups = tensor * draw(st.integers(1, 2))
    model = ModelConfig(
        num_layers=pipeline * virtual + draw(st.integers(0, 3)),
        hidden_size=draw(st.integers(1, 4)) * 4,
        ffn_hidden_size=tensor * draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=2,
        vocab_size=draw(st.integers(1, 700)),
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        bias=draw(st.booleans()),
    )
    return model, ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)


@settings(max_examples=60, deadline=None)
@given(case=layouts())
def test_the_ranks_together_hold_every_value(case: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = case
    held = {name: torch.zeros(spec.shape, dtype=torch.int32) for name, spec in parameter_specs(model).items()}
    for rank in range(parallel.model_size):
        for name, regions in rank_regions(model, parallel, rank % parallel.tensor, rank // parallel.tensor).items():
            for region in regions:
                held[name][region.slices] += 1
    for name, times in held.items():
        row_parallel_bias = name.endswith(("linear_proj.bias", "linear_fc2.bias"))
        copies = parallel.tensor if REPLICATED in name or row_parallel_bias else 1
        assert times.eq(copies).all(), name


@settings(max_examples=15, deadline=None)
@given(case=layouts(), data=st.data())
def test_any_region_of_any_layout_is_that_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[ModelConfig, ParallelConfig], data: st.DataObject
) -> None:
    model, parallel = case
    source = InitialCheckpoint(model, 3, optimizer=True, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("layout") / "out"
    reshard(source, path, Processes(), Manifest(), (model, parallel))
    checkpoint = TorchDistCheckpoint(path)
    for name in data.draw(st.lists(st.sampled_from(sorted(source.tensors)), min_size=3, max_size=3)):
        shape = source.tensors[name].shape
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        region = Region(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))
        assert torch.equal(checkpoint.read(name, region), source.read(name)[region.slices])


def test_a_target_rank_finds_its_part_in_its_own_files(tmp_path: Path) -> None:
    model = ModelConfig(num_layers=4, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, vocab_size=300)
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2)
    reshard(InitialCheckpoint(model, 3), tmp_path / "out", Processes(), Manifest(), (model, parallel))
    checkpoint = TorchDistCheckpoint(tmp_path / "out")
    for rank in range(4):
        for name, regions in rank_regions(model, parallel, rank % 2, rank // 2).items():
            files = {
                chunk.file for chunk in checkpoint.chunks[name] for region in regions if chunk.region.intersect(region)
            }
            own = rank - rank % 2 if REPLICATED in name else rank
            assert files == {f"__{own}_0.distcp"}, (rank, name)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 3}, "linear_qkv.weight: its 4 query groups cannot be split over tensor size 3"),
        ({"pipeline": 5}, "4 layers cannot be split into 5 model chunks"),
        ({"tensor": 16}, "query groups"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(layout: dict[str, Any], message: str) -> None:
    model = ModelConfig(num_layers=4, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, vocab_size=300)
    with pytest.raises(RequestError, match=message):
        rank_regions(model, ParallelConfig(**layout), 0, 0)


TRILLION = ModelConfig(**(load_preset("tele-flm-1t")["model"] | {"vocab_size": 80_000}))
LAYOUT = ParallelConfig(tensor=32, pipeline=28)


def test_the_shards_of_a_trillion_parameters_add_up() -> None:
    """32 x 28 ranks of the true shapes, from arithmetic alone."""
    held = dict.fromkeys(parameter_specs(TRILLION), 0)
    for pipeline_rank in range(28):
        for tensor_rank in range(32):
            for name, regions in rank_regions(TRILLION, LAYOUT, tensor_rank, pipeline_rank).items():
                held[name] += sum(region.numel for region in regions)
    for name, spec in parameter_specs(TRILLION).items():
        assert held[name] == spec.numel * (32 if REPLICATED in name else 1)


@pytest.mark.parametrize(("tensor_rank", "pipeline_rank"), [(0, 0), (17, 5), (31, 27)])
def test_a_rank_of_a_trillion_parameters_has_the_bits_of_the_whole(tensor_rank: int, pipeline_rank: int) -> None:
    """The corners of each of a rank's regions, read as its own and as part of a larger region around them."""
    checkpoint = InitialCheckpoint(TRILLION, 11, dtype=torch.bfloat16)
    names = set()
    for name, regions in rank_regions(TRILLION, LAYOUT, tensor_rank, pipeline_rank).items():
        shape = checkpoint.tensors[name].shape
        for region in regions:
            for part in (first_part(region), last_part(region)) if region.numel else ():
                around = widened(part, shape)
                assert torch.equal(
                    checkpoint.read(name, part), checkpoint.read(name, around)[part.within(around).slices]
                ), name
                names.add(name)
    middle = {EMBEDDING, HEAD, "decoder.final_layernorm.weight"}
    assert names >= set(parameter_specs(TRILLION)) - middle
    assert (EMBEDDING in names) == (pipeline_rank == 0)
    assert (HEAD in names) == (pipeline_rank == 27)


def first_part(region: Region) -> Region:
    """At most 20,000 values at the start of a region."""
    return next(iter(split_region(region, 20_000)))


def last_part(region: Region) -> Region:
    """A small region at the end of a region."""
    sizes = tuple(min(n, 40) for n in region.sizes)
    offsets = tuple(o + n - m for o, n, m in zip(region.offsets, region.sizes, sizes, strict=True))
    return Region(offsets, sizes)


def widened(region: Region, shape: tuple[int, ...]) -> Region:
    """A region around `region` that reaches into what its neighbours hold."""
    offsets = tuple(max(0, o - 3) for o in region.offsets)
    ends = tuple(min(s, o + n + 5) for s, o, n in zip(shape, region.offsets, region.sizes, strict=True))
    return Region(offsets, tuple(e - o for e, o in zip(ends, offsets, strict=True)))


def test_the_preset_is_a_trillion_parameters() -> None:
    assert parameter_count(TRILLION) / 1e9 == pytest.approx(1083.735, abs=5e-4)
