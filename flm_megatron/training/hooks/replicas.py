"""Detects silent corruption: weights that several ranks hold must be bit-identical on all of them."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.sharding.placement import Placement, placements
from flm_megatron.device import current
from flm_megatron.distributed.channels import gathered
from flm_megatron.engine.data_parallel import finish_gathering
from flm_megatron.engine.types import ReplicatedChunk
from flm_megatron.errors import FlmError
from flm_megatron.training.hooks.hook import Hook
from flm_megatron.training.resume.memory_copies import forgotten_on_error

if TYPE_CHECKING:
    from flm_megatron.training.resume.memory_copies import MemoryCopies
    from flm_megatron.training.stage import StageTrainer

CHUNK_VALUES = 2**24
KEY_BYTES = 8
Key = TypeVar("Key", bound=Hashable)


class CompareReplicas(Hook):
    """Compares replicas every `stability.checksum_interval_steps` steps and before each checkpoint."""

    def __init__(self, interval_steps: int, copies: MemoryCopies | None) -> None:
        self.interval_steps, self.copies = interval_steps, copies
        self.compared_step = -1

    def at_interval(self, trainer: StageTrainer) -> None:
        """Compare, once a step. If replicas differ, the copies in memory are dropped: they may be corrupt too."""
        if self.compared_step == trainer.step:
            return
        with trainer.meter.stall("replicas"), forgotten_on_error(self.copies):
            equal_step = max(self.compared_step, trainer.start.step)  # they are loaded from one place
            check_replicas(trainer.state.chunks, trainer.step, equal_step)
        self.compared_step = trainer.step

    def on_save(self, trainer: StageTrainer) -> None:
        """Never save replicas that differ."""
        self.at_interval(trainer)


@torch.no_grad()
def check_replicas(chunks: list[ReplicatedChunk], step: int, equal_step: int) -> None:
    """Compare the weights that several ranks hold, over the whole world.

    Data-parallel ranks hold copies of all weights, tensor-parallel ranks of norms and some biases. `equal_step` is the
    last step at which all were equal, from which the run can continue.

    Raises:
        FlmError: (on every rank) copies differ; names the ranks that the majority disagrees with, and a tensor.
    """
    finish_gathering(chunks)
    places = {_number(p): p for p in placements(chunks)}
    mismatched = mismatched_replicas(_gathered({number: checksum(place.tensor) for number, place in places.items()}))
    if mismatched:
        mine = mismatched.get(dist.get_rank())
        raise FlmError(_difference(mismatched, places[mine] if mine else None, step, equal_step))


def _number(place: Placement) -> int:
    """A nonzero number that identifies a region of a tensor on all ranks: a hundredth of the bytes of its name."""
    text = f"{place.name} {place.region.offsets}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=KEY_BYTES).digest(), "big", signed=True) or 1


def _gathered(sums: dict[int, int]) -> list[dict[int, int]]:
    """Every rank's checksums by region number, gathered in tensors of equal size (16 bytes a checksum)."""
    device = current().torch_device
    count = torch.tensor([len(sums)], device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    mine = torch.zeros(int(count.item()), 2, dtype=torch.int64)
    mine[: len(sums)] = torch.tensor(list(sums.items()), dtype=torch.int64).view(-1, 2)
    everyone = torch.empty(dist.get_world_size() * mine.numel(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(everyone, mine.view(-1).to(device))
    rows = everyone.view(dist.get_world_size(), -1, 2).tolist()
    return [{number: value for number, value in row if number} for row in rows]


def _difference(mismatched: dict[int, int], mine: Placement | None, step: int, equal_step: int) -> str:
    """The error message, once all ranks know which of them are mismatched; `mine` is this rank's region, if any."""
    everyone = gathered((socket.gethostname(), _label(mine) if mine else None))
    first, where = next((rank, everyone[rank][1]) for rank in mismatched)
    ranks = ", ".join(f"rank {rank} on {everyone[rank][0]}" for rank in mismatched)
    return (
        f"after step {step} copies of weights that must be equal differ: {ranks} (rank {first}: {where}); they "
        f"were equal for the last time after step {equal_step}: take the machine out of the run and go on from a "
        "checkpoint of that step or an earlier one"
    )


def _label(part: Placement) -> str:
    return part.name if part.layer is None else f"{part.name} of layer {part.layer}"


def mismatched_replicas(everyone: list[dict[Key, int]]) -> dict[int, Key]:
    """Ranks whose checksum differs from that of most copies, each with one such tensor.

    Without a majority (two copies that differ) all ranks that hold the tensor are mismatched.
    """
    holders: dict[Key, dict[int, int]] = {}
    for rank, sums in enumerate(everyone):
        for key, value in sums.items():
            holders.setdefault(key, {})[rank] = value
    mismatched: dict[int, Key] = {}
    for key, values in holders.items():
        common, count = Counter(values.values()).most_common(1)[0]
        majority = 2 * count > len(values)
        for rank, value in values.items():
            if not majority or value != common:
                mismatched.setdefault(rank, key)
    return dict(sorted(mismatched.items()))


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum that changes with any bit of `tensor` and with the order of its values."""
    whole = tensor.contiguous().view(-1)
    bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK_VALUES):
        chunk = bits[start : start + CHUNK_VALUES].to(torch.int64)
        # Odd factors lose no bit; sums wrap around.
        total += (chunk * (2 * torch.arange(start, start + len(chunk), device=tensor.device) + 1)).sum()
    return int(total.item())
