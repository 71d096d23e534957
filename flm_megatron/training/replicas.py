"""Finding silent corruption: weights that several ranks hold must be the same bits on all of them."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.engine import finish_gathering
from flm_megatron.checkpoint.placement import placements
from flm_megatron.errors import FlmError

PIECE = 2**24
Key = tuple[str, tuple[int, ...]]


@torch.no_grad()
def check_replicas(chunks: list[Any], step: int) -> None:
    """Compare the weights that several ranks hold, over the whole world.

    Copies are held by data-parallel peers, and of norms and some biases by tensor-parallel peers too.

    Raises:
        FlmError: (on every rank) copies differ; names the ranks that the majority disagrees with, and a tensor.
    """
    finish_gathering(chunks)
    mine = {(p.name, p.region.offsets): checksum(p.tensor) for p in placements(chunks)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    odd = odd_copies([sums for _, sums in everyone])
    if odd:
        rank, (name, offsets) = next(iter(odd.items()))
        layer = f" of layer {offsets[0]}" if name.startswith("decoder.layers.") else ""
        ranks = ", ".join(f"rank {r} on {everyone[r][0]}" for r in odd)
        raise FlmError(
            f"after step {step} copies of weights that must be equal differ: {ranks} (rank {rank}: {name}{layer}); "
            "take the machine out of the run and go on from the last checkpoint"
        )


def odd_copies(everyone: list[dict[Key, int]]) -> dict[int, Key]:
    """Ranks whose checksum of a tensor is not the one that most of its copies have, each with such a tensor.

    Where no value has a majority (two copies that differ), all ranks that hold the tensor are odd.
    """
    holders: dict[Key, dict[int, int]] = {}
    for rank, sums in enumerate(everyone):
        for key, value in sums.items():
            holders.setdefault(key, {})[rank] = value
    odd: dict[int, Key] = {}
    for key, values in holders.items():
        common, count = Counter(values.values()).most_common(1)[0]
        majority = 2 * count > len(values)
        for rank, value in values.items():
            if not majority or value != common:
                odd.setdefault(rank, key)
    return dict(sorted(odd.items()))


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit number that changes with any bit of `tensor`, and with the order of its values."""
    whole = tensor.contiguous().view(-1)
    bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), PIECE):
        piece = bits[start : start + PIECE].to(torch.int64)
        # Odd factors lose no bit; sums wrap around.
        total += (piece * (2 * torch.arange(start, start + len(piece), device=tensor.device) + 1)).sum()
    return int(total.item())
