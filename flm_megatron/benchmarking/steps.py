"""Steps on synthetic tokens: drawing them, and timing and weighing what runs on them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.training.step import Batch

Step = Callable[[list[Batch]], float]
"""A training step on the micro-batches of this process, which returns their mean loss."""

INIT_STD = 0.02


def synthetic_batches(stage: StageConfig, sequence_length: int, data_size: int, seed: int = 0) -> list[Batch]:
    """One data rank's micro-batches of a step: random tokens and labels [micro_batch, sequence], none masked."""
    assert stage.model.vocab_size
    shape = (stage.micro_batch, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(stage.global_batch // stage.micro_batch // data_size):
        text = torch.randint(stage.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "position_ids": torch.arange(sequence_length).expand(shape),
                "loss_mask": torch.ones(shape),
            }
        )
    return batches


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Fill every matrix of `model` from a normal distribution: a step takes as long with any finite weights."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, INIT_STD)


def timed(step: Step, batches: list[Batch]) -> float:
    """Wall time of one step in seconds, the device's queue empty before and after."""
    device = current()
    device.synchronize()
    began = time.perf_counter()
    step(batches)
    device.synchronize()
    return time.perf_counter() - began


def held_gib() -> float:
    """Memory that this process holds now (on a GPU, what its tensors do)."""
    device = current()
    device.reset_peak_memory()
    return device.peak_memory_gib()


def slowest(times: list[float]) -> list[float]:
    """Of each step the time of the slowest process of the world."""
    tensor = torch.tensor(times, dtype=torch.float64, device=current().torch_device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()
