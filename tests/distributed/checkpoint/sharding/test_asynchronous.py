"""Saving in the background, and failing together."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from flm_megatron.checkpoint.logical import STATE_PREFIXES
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import save_state
from flm_megatron.checkpoint.torch_dist import shard_file
from flm_megatron.checkpoint.torch_dist.logical_hash import tensor_hashes
from flm_megatron.checkpoint.torch_dist.tensor_record import encode
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.device import use
from flm_megatron.distributed import channels
from flm_megatron.errors import FlmError
from tests.support.late_device import LateDevice
from tests.support.layouts import take_steps, train_state_under
from tests.support.pool import Pool

MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=250)
LAYOUT = ParallelConfig(tensor=2, data=2)


def _stage(precision: Precision = "bf16") -> StageConfig:
    return StageConfig(model=MODEL, precision=precision, global_batch=8, tokens=10 * 8 * 16)


def slow_encode(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
    time.sleep(0.02)
    return encode(dtype, shape, crc)


def change_while_writing(folder: str, precision: Precision, late: bool) -> list[bool]:
    """A plain save, then a slow one in the background during which weights and state change: by training, then all."""
    with train_state_under(LAYOUT, _stage(precision)) as state:
        if late:
            use(LateDevice())
        take_steps(state, range(1))
        save_state(f"{folder}/plain", state.chunks, state.optimizer, Manifest(position=StagePosition(1))).wait()
        shard_file.encode = slow_encode
        handle = save_state(
            f"{folder}/slow", state.chunks, state.optimizer, Manifest(position=StagePosition(1)), asynchronous=True
        )
        early = handle.done
        take_steps(state, range(1, 3))
        for chunk in state.chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(3.0)
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(3.0)
        handle.wait()
        return [early, handle.done]


@pytest.mark.parametrize(("precision", "late"), [("fp32", True), ("bf16", False)])
def test_weights_that_change_during_a_slow_write(pool: Pool, tmp_path: Path, precision: Precision, late: bool) -> None:
    assert pool.run(4, change_while_writing, str(tmp_path), precision, late) == [[False, True]] * 4
    plain, slow = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "slow")
    assert tensor_hashes(plain) == tensor_hashes(slow)
    assert any(name.startswith(STATE_PREFIXES) for name in slow.tensors)


def fail_on_one_rank(folder: str, asynchronous: bool) -> str:
    with train_state_under(LAYOUT, _stage()) as state:
        if dist.get_rank() == 2:

            def full(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
                raise OSError(28, "No space left on device")

            shard_file.encode = full
        try:
            save_state(f"{folder}/a", state.chunks, state.optimizer, Manifest(), asynchronous=asynchronous).wait()
        except FlmError as error:
            message = f"{type(error).__name__} {error}"
        shard_file.encode = encode
        save_state(f"{folder}/b", state.chunks, state.optimizer, Manifest(), asynchronous=asynchronous).wait()
        total = torch.ones(1)
        dist.all_reduce(total)  # training's own group is still in step
        assert total == 4
        return message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_fails_on_all_ranks(pool: Pool, tmp_path: Path, asynchronous: bool) -> None:
    messages = pool.run(4, fail_on_one_rank, str(tmp_path), asynchronous)
    assert all(m.startswith("RequestError") and "No space left" in m and "__2_0.distcp" in m for m in messages), (
        messages
    )
    assert "rank 2" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def exists_already(folder: str) -> str:
    with train_state_under(ParallelConfig(data=2), _stage()) as state:
        save_state(f"{folder}/a", state.chunks, state.optimizer, Manifest()).wait()
        with pytest.raises(FlmError) as caught:
            save_state(f"{folder}/a", state.chunks, state.optimizer, Manifest()).wait()
        return str(caught.value)


def test_an_existing_checkpoint_is_not_overwritten(pool: Pool, tmp_path: Path) -> None:
    assert all("exists already" in message for message in pool.run(2, exists_already, str(tmp_path)))
    open_checkpoint(tmp_path / "a")


def connections_of_saves(folder: str) -> list[tuple[int, int]]:
    """Process groups and open files before the first save, after it and after the second."""
    with train_state_under(LAYOUT, _stage()) as state:
        take_steps(state, range(1))
        found = []
        for name in ("a", "b", None):
            dist.barrier()
            found.append((len(_world.pg_map), psutil.Process().num_fds()))
            dist.barrier()
            if name:
                save_state(f"{folder}/{name}", state.chunks, state.optimizer, Manifest(), asynchronous=True).wait()
        return found


def test_saving_makes_no_connection(pool: Pool, tmp_path: Path) -> None:
    for first, *others in pool.run(4, connections_of_saves, str(tmp_path)):
        assert all(groups == first[0] and files <= first[1] for groups, files in others), (first, others)


def stop_in_a_save(folder: str) -> str:
    """Rank 1 stops in the middle of a save, as one does that is frozen or gone; what the others are told."""
    channels.SLOWEST_WORK = timedelta(seconds=2)
    with train_state_under(LAYOUT, _stage()) as state:
        if dist.get_rank() == 1:

            def stop(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
                time.sleep(3600)
                return encode(dtype, shape, crc)

            shard_file.encode = stop
        handle = save_state(f"{folder}/a", state.chunks, state.optimizer, Manifest(), asynchronous=True)
        total = torch.ones(1)
        dist.all_reduce(total)  # training goes on meanwhile
        if dist.get_rank() == 1:
            with pytest.raises(TimeoutError, match=r"a is not whole after 0\.5 s"):
                handle.wait(0.5)
            return str(handle.failed)
        with pytest.raises(FlmError) as caught:
            handle.wait()
        assert handle.failed and total == 4
        return str(caught.value)


def test_a_rank_that_stops_in_a_save_is_named_in_time(pool: Pool, tmp_path: Path) -> None:
    messages = pool.run(4, stop_in_a_save, str(tmp_path))
    assert messages[1] == "False"
    assert all("nothing came from rank 1 for 2 s" in messages[rank] for rank in (0, 2, 3)), messages
    assert not (tmp_path / "a").exists()
