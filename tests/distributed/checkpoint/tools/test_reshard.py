"""Processes that share the work of the checkpoint tools, and the tools' layouts against the engine's own."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.megatron_legacy.writer import write_megatron_legacy
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.engine.data_parallel import unwrap
from tests.support.checkpoint_cases import flm_checkpoint, write_small
from tests.support.layouts import STAGE, name, take_steps, train_state_under
from tests.support.pool import Pool

MODEL = ModelConfig(
    num_layers=5, hidden_size=48, ffn_hidden_size=70, num_attention_heads=6, num_query_groups=2, vocab_size=150
)
LAYOUTS = [
    ParallelConfig(tensor=2, pipeline=2, data=1),
    ParallelConfig(pipeline=2, virtual_pipeline=2, data=1),
    ParallelConfig(tensor=2, sequence=True, data=1),
    ParallelConfig(pipeline=2, data=1, pipeline_layers=[1, 4]),
]


def commands(folder: str) -> tuple[list[int], str]:
    """Exit statuses of commands run on every rank, and what this rank printed."""
    path, output = Path(folder), io.StringIO()
    with contextlib.redirect_stdout(output):
        statuses = [
            flm_checkpoint("reshard", path / "source", path / "merged"),
            flm_checkpoint("reshard", path / "source", path / "layout", "--tensor", 3, "--pipeline", 2),
            flm_checkpoint("reshard", path / "source", path / "classic", "--format", "classic", "--tensor", 3),
            flm_checkpoint("export-hf", path / "merged", path / "hf", "--shard-size", "100KB"),
            flm_checkpoint("import-hf", path / "hf", path / "back"),
            flm_checkpoint("verify", path / "layout"),
            flm_checkpoint("diff", path / "layout", path / "merged"),
            flm_checkpoint("diff", path / "classic", path / "back"),
            flm_checkpoint("inspect", path / "source", "--statistics"),
        ]
    return statuses, output.getvalue()


def test_several_processes_share_every_command(pool: Pool, tmp_path: Path) -> None:
    written = write_small(tmp_path / "source")
    results = pool.run(3, commands, str(tmp_path))
    assert all(statuses == [0] * 9 for statuses, _ in results)
    assert results[1][1] == results[2][1] == "", "only the first process speaks"
    assert results[0][1].count("logical hash before") == 3
    for folder in ("merged", "layout", "hf", "back", "classic"):
        checkpoint = open_checkpoint(tmp_path / folder)
        for tensor in checkpoint.tensors:
            assert torch.equal(checkpoint.read(tensor), written.read(tensor)), (folder, tensor)
    assert {file.name for file in (tmp_path / "merged").glob("*.distcp")} == {f"__{n}_0.distcp" for n in range(3)}


class FailsOnOneRank(InitialCheckpoint):
    """Initial weights that the second process cannot read."""

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region, or an error."""
        if dist.get_rank() == 1 and name == "output_layer.weight":
            raise OSError(28, "No space left on device")
        return super().read(name, region)


def failing_copy(folder: str) -> str:
    """The error that each rank gets when one fails."""
    checkpoint = FailsOnOneRank(MODEL, 3)
    with pytest.raises(Exception) as caught:
        write_megatron_legacy(
            checkpoint, Path(folder) / "out", (MODEL, ParallelConfig(tensor=2, pipeline=1)), Processes()
        )
    return f"{type(caught.value).__name__}: {caught.value}"


def test_the_failure_of_one_process_is_everyones_and_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, failing_copy, str(tmp_path))
    assert "RequestError" in first and "rank 1" in first
    assert "No space left on device" in second
    assert list(tmp_path.iterdir()) == []


def engine_against_tools(parallel: ParallelConfig, folder: str) -> list[str]:
    """Parameters of this rank where the engine and the tools disagree about what it holds."""
    stage = replace(STAGE, model=MODEL)
    with train_state_under(parallel, stage, seed=3) as state:
        from flm_megatron.engine import parallel_state

        tensor = parallel_state.get_tensor_model_parallel_rank()
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        problems = _regions_differ(state.chunks, rank_regions(MODEL, parallel, tensor, pipeline))
        if parallel.virtual_pipeline == 1 and not parallel.pipeline_layers:
            rank = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if parallel.pipeline > 1 else "")
            file = Path(folder) / "release" / rank / "model_optim_rng.pt"
            saved = torch.load(file, weights_only=False)["model"]
            own = dict(unwrap(state.chunks[0]).named_parameters())
            problems += sorted(set(saved) ^ {classic_name(key) for key in own})
            problems += [key for key, value in own.items() if not torch.equal(saved[classic_name(key)], value)]
        return problems


def classic_name(own: str) -> str:
    """Megatron-LM's name of a parameter: norms before attention and feed-forward layer lie in the linear layers."""
    return own.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_").replace(
        ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
    )


def _regions_differ(chunks: list[Any], held: dict[str, list[Region]]) -> list[str]:
    engine: dict[str, set[Region]] = {}
    for placement in placements(chunks):
        engine.setdefault(placement.name, set()).add(placement.region)
    tools = {
        key: {one for region in regions for one in (_layers(region) if key.startswith("decoder.layers") else [region])}
        for key, regions in held.items()
    }
    tools = {key: {region for region in regions if region.numel} for key, regions in tools.items()}
    return sorted(key for key in {*engine, *tools} if engine.get(key, set()) != tools.get(key, set()))


def _layers(region: Region) -> list[Region]:
    return [
        Region((region.offsets[0] + layer, *region.offsets[1:]), (1, *region.sizes[1:]))
        for layer in range(region.sizes[0])
    ]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=name)
def test_the_tools_cut_tensors_as_the_engine_does(pool: Pool, tmp_path: Path, parallel: ParallelConfig) -> None:
    if parallel.virtual_pipeline == 1:
        write_megatron_legacy(InitialCheckpoint(MODEL, 3), tmp_path / "out", (MODEL, parallel), Processes())
    results = pool.run(parallel.model_size, engine_against_tools, parallel, str(tmp_path / "out"))
    assert results == [[]] * parallel.model_size


def train_from(path: str, parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps from a checkpoint's weights."""
    with train_state_under(parallel, replace(STAGE, model=MODEL), seed=99) as state:
        load_state(open_checkpoint(path), state.chunks, state.optimizer)
        return take_steps(state, range(3))


def test_training_starts_straight_from_a_hugging_face_folder(pool: Pool, tmp_path: Path) -> None:
    initial = InitialCheckpoint(MODEL, 3)
    write_hugging_face(initial, MODEL, tmp_path / "hf", ExportOptions(shard_bytes=50_000, pad_vocab_to=7))
    copy_checkpoint(initial, tmp_path / "ours")
    parallel = ParallelConfig(tensor=2, pipeline=2, data=1)
    straight = pool.run(4, train_from, str(tmp_path / "hf"), parallel)
    assert straight == pool.run(4, train_from, str(tmp_path / "ours"), parallel)
