"""Saves in the background of a run whose training fails, and of one that goes on while its save has failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.tools.verify import verify_checkpoint
from flm_megatron.checkpoint.torch_dist import shard_file
from flm_megatron.checkpoint.torch_dist.tensor_record import encode
from flm_megatron.config.loader import run_from_dict, run_to_dict
from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.local_processes import run_processes
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.signals import StopRequest
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.launch.preflight import resolve
from flm_megatron.training.metrics.events import MetricsEvent, read_events
from flm_megatron.training.resume.start import checkpoint_store, find_start
from flm_megatron.training.stage import StageTrainer, train_stage
from flm_megatron.training.step import Batch
from tests.support.runs import make_run


def asynchronous_run(data: Path, output: Path, interval: int) -> RunConfig:
    """A run of 8 steps under tensor 2 that saves in the background."""
    options = ("--checkpoint.asynchronous", "true", "--checkpoint.interval_steps", str(interval))
    return resolve(make_run(data, output, *options)[1])


def train_with(run: dict[str, Any], start: Any, fault: str) -> int:
    """Train the first stage with a fault on rank 1: training that fails during a slow save, or a save that fails."""
    import torch.distributed as dist

    take = StageTrainer._train_step

    def step(self: StageTrainer, group: list[Batch], stop: StopRequest, waited_s: float) -> bool:
        if fault == "training" and self.step == 3 and dist.get_rank() == 1:
            raise ValueError("planted")
        if fault == "saving" and self.step >= 4:
            time.sleep(0.4)
        return take(self, group, stop, waited_s)

    def write(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
        if fault == "saving" and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        time.sleep(0.05 if fault == "training" else 0)
        return encode(dtype, shape, crc)

    StageTrainer._train_step = step  # type: ignore[method-assign]
    shard_file.encode = write
    return 0 if train_stage(run_from_dict(run), start) else 3


def train_to_an_error(run: RunConfig, fault: str) -> None:
    """As `flm train` would, with a fault."""
    run_processes(2, train_with, (run_to_dict(run), find_start(run), fault), run.distributed.timeout_s)


def test_an_error_in_training_does_not_lose_the_save_under_way(data: Path, tmp_path: Path) -> None:
    run = asynchronous_run(data, tmp_path, 2)
    with pytest.raises(FlmError, match=r"(?s)rank 1: .*ValueError: planted"):
        train_to_an_error(run, "training")
    path = checkpoint_store(run).latest(["small"])
    assert path is not None and path.name == "step_00000002"
    assert not verify_checkpoint(path, False, Processes(), lambda moved: None).problems


def test_a_save_that_failed_ends_the_run_at_once_and_not_at_the_next_save(data: Path, tmp_path: Path) -> None:
    run = asynchronous_run(data, tmp_path, 4)
    with pytest.raises(RequestError, match="No space left"):
        train_to_an_error(run, "saving")
    assert max(event.step for event in read_events(tmp_path, MetricsEvent)) < 8
    assert checkpoint_store(run).latest(["small"]) is None
