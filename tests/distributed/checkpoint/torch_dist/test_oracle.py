"""megatron-core reads what is written here, and what megatron-core writes is read here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import EXP_AVG, MASTER, STATE_PREFIXES, Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
from flm_megatron.checkpoint.torch_dist.logical_hash import tensor_hashes
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.engine.data_parallel import unwrap
from flm_megatron.errors import RequestError
from tests.support.layouts import take_steps, train_state_under
from tests.support.pool import Pool

MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=256)
LAYOUT = ParallelConfig(data=2)
KINDS = ("fully_reshardable", "dp_reshardable")


def _stage() -> StageConfig:
    return StageConfig(model=MODEL, precision="bf16", global_batch=8, tokens=10 * 8 * 16)


def _model(state: Any) -> Any:
    """The engine's model, whose sharded state is megatron-core's own."""
    return unwrap(state.chunks[0])


def _state(state: Any, kind: str, loading: bool) -> dict[str, Any]:
    from flm_megatron.engine import parallel_state

    metadata = {
        "distrib_optim_sharding_type": kind,
        "dp_cp_group": parallel_state.get_data_parallel_group(),
    }
    model = _model(state).sharded_state_dict(metadata=metadata)
    return {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "iteration": 3,
    }


def save_with_megatron(folder: str) -> None:
    """The same state saved by megatron-core, in its two formats, and by this project."""
    from megatron.core import dist_checkpointing

    with train_state_under(LAYOUT, _stage()) as state:
        take_steps(state, range(2))
        for kind in KINDS:
            path = Path(folder) / kind
            if dist.get_rank() == 0:
                path.mkdir()
            dist.barrier()
            dist_checkpointing.save(_state(state, kind, False), str(path), async_sharded_save=False)
        manifest = Manifest(position=StagePosition(3, optimizer_step=2))
        save_state(Path(folder) / "ours", state.chunks, state.optimizer, manifest).wait()


def load_with_megatron(ours: str, again: str) -> None:
    """Our checkpoint of two data-parallel ranks loaded by megatron-core into one, and saved again by us."""
    from megatron.core import dist_checkpointing

    with train_state_under(ParallelConfig(data=1), _stage(), seed=99) as state:
        loaded = dist_checkpointing.load(
            {"model": _model(state).sharded_state_dict(), "iteration": 0}, ours, strict="log_unexpected"
        )
        assert loaded["iteration"] == 3
        _model(state).load_state_dict(loaded["model"])
        saved = _state(state, "fully_reshardable", True)
        tensors = {"param_state": saved["optimizer"]["param_state"]}
        filled = dist_checkpointing.load(tensors, ours)["param_state"]
        part: Any = state.optimizer.chained_optimizers[0]
        part.load_parameter_state_from_fully_reshardable(filled)
        save_state(again, state.chunks, state.optimizer, Manifest()).wait()


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pool.run(2, save_with_megatron, str(folder))
    return folder


def test_megatrons_checkpoint_is_read_with_its_optimizer(saved: Path) -> None:
    theirs, ours = open_checkpoint(saved / "fully_reshardable"), open_checkpoint(saved / "ours")
    assert theirs.has_optimizer()
    names = set(ours.tensors)
    assert names <= set(theirs.tensors)
    assert tensor_hashes(theirs, names) == tensor_hashes(ours)
    assert theirs.manifest.position == StagePosition(3, optimizer_step=2)
    name = EXP_AVG + "decoder.layers.mlp.linear_fc1.weight"
    region = Region((1, 40, 3), (1, 20, 11))
    assert torch.equal(theirs.read(name, region), ours.read(name)[region.slices])


def test_megatron_loads_ours(saved: Path, pool: Pool, tmp_path: Path) -> None:
    pool.run(1, load_with_megatron, str(saved / "ours"), str(tmp_path / "again"))
    again, ours = open_checkpoint(tmp_path / "again"), open_checkpoint(saved / "ours")
    assert tensor_hashes(again) == tensor_hashes(ours)


def load_foreign(path: str) -> None:
    with train_state_under(ParallelConfig(data=1), _stage(), seed=99) as state:
        checkpoint = open_checkpoint(path)
        with pytest.raises(RequestError, match="dp_reshardable"):
            load_state(checkpoint, state.chunks, state.optimizer)
        load_state(checkpoint, state.chunks)


def test_nameless_buckets_are_refused_but_the_weights_are_read(saved: Path, pool: Pool) -> None:
    theirs, ours = open_checkpoint(saved / "dp_reshardable"), open_checkpoint(saved / "ours")
    weight = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(theirs.read(weight), ours.read(weight))
    with pytest.raises(RequestError, match="dp_reshardable"):
        theirs.read(MASTER + weight)
    pool.run(1, load_foreign, str(saved / "dp_reshardable"))


def save_in_small_chunks(path: str) -> None:
    """As `ours`, with weights in chunks as those of a large model are."""
    from flm_megatron.checkpoint.torch_dist import writer

    writer.SMALLEST_CHUNK = 4096
    with train_state_under(LAYOUT, _stage()) as state:
        take_steps(state, range(2))
        save_state(path, state.chunks, state.optimizer, Manifest(position=StagePosition(3, optimizer_step=2))).wait()


def test_chunks_of_a_weight_are_shared_out_among_its_replicas(saved: Path, pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save_in_small_chunks, str(tmp_path / "small"))
    ours, small = open_checkpoint(saved / "ours"), open_checkpoint(tmp_path / "small")
    assert tensor_hashes(small) == tensor_hashes(ours)
    assert isinstance(small, TorchDistCheckpoint)
    written: dict[str, int] = {}
    for name in (name for name in small.chunks if not name.startswith(STATE_PREFIXES)):
        for chunk in small.chunks[name]:
            nbytes = 2 * chunk.region.numel
            assert nbytes <= 4096
            written[chunk.file] = written.get(chunk.file, 0) + nbytes
    first, second = written.values()
    assert abs(first - second) <= 4096


def load_other_vocabularies() -> None:
    """One that is too small, and one with rows of padding, as Megatron-LM's have."""
    with train_state_under(ParallelConfig(data=1), _stage(), seed=99) as state:
        with pytest.raises(RequestError, match=r"embeddings\.weight has shape \(255, 32\) .* and \(256, 32\)"):
            load_state(InitialCheckpoint(replace(MODEL, vocab_size=255), seed=3), state.chunks)
        padded = InitialCheckpoint(replace(MODEL, vocab_size=384), seed=3)
        load_state(padded, state.chunks)
        weight = _model(state).embedding.word_embeddings.weight[:256]
        assert torch.equal(weight, padded.read("embedding.word_embeddings.weight")[:256].bfloat16())


def test_a_smaller_vocabulary_is_refused_and_padding_is_left_out(pool: Pool) -> None:
    pool.run(1, load_other_vocabularies)


def test_plain_torch_loads_a_written_view(tmp_path: Path) -> None:
    checkpoint = InitialCheckpoint(MODEL, seed=3, optimizer=True, dtype=torch.bfloat16)
    copy_checkpoint(checkpoint, tmp_path / "a", Manifest(), chunk_bytes=1000)
    loaded = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    assert all(torch.equal(loaded[name], checkpoint.read(name)) for name in checkpoint.tensors)
