"""Pushing the weights of a checkpoint from ranks under one layout to ranks under another, in one world."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.description import Held
from flm_megatron.checkpoint.exchange.plan import Traffic
from flm_megatron.checkpoint.exchange.refit import Refit, memory_for, rank_shards
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.opening import open_with_model
from flm_megatron.checkpoint.tools.hashing import recorded_hashes, shared_hashes
from flm_megatron.checkpoint.torch_dist.logical_hash import combine_hashes, partial_hash, tensor_hash
from flm_megatron.config.schema import DistributedConfig, ModelConfig, ParallelConfig
from flm_megatron.device import current
from flm_megatron.distributed.channels import gathered
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.world import launched, tool_world
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import given_location


@dataclass(frozen=True)
class Refitted:
    """Weights that were pushed and found to be those of the checkpoint: their hash, what it took all ranks, and
    seconds for the plan and for each push."""

    logical_hash: str
    traffic: Traffic
    plan_s: float
    push_s: tuple[float, ...]


def refit(
    checkpoint: FilePath,
    *,
    from_ranks: Sequence[int],
    to_ranks: Sequence[int],
    from_layout: ParallelConfig | None = None,
    to_layout: ParallelConfig | None = None,
    pushes: int = 2,
) -> Refitted:
    """Read a checkpoint's weights into some ranks of torchrun's world under one layout, push them to others under
    another, and compare the hashes of what arrived. All ranks of the world, which may exist already, call.

    It shows what `Refit` does for a trainer and a generator of one's own.

    Args:
        checkpoint: folder of any format.
        from_ranks, to_ranks: ranks of the world, none of them on both sides.
        from_layout, to_layout: tensor and pipeline sizes on each side, whose ranks are numbered as they are listed.
        pushes: how often they are pushed.

    Raises:
        RequestError: the ranks are not there, or a layout does not fit them or the model.
        DamagedError: the checkpoint cannot be read, or other values arrived.
    """
    _check_ranks(from_ranks, to_ranks)
    opened, model = open_with_model(given_location(checkpoint, "checkpoint"))
    source = ConvertedCheckpoint(opened, optimizer=False)
    sides = (from_ranks, from_layout or ParallelConfig()), (to_ranks, to_layout or ParallelConfig())
    for ranks, parallel in sides:
        rank_shards(model, parallel, 0, len(ranks))
    with nullcontext() if dist.is_initialized() else tool_world(DistributedConfig()):
        held, wanted = (_memory(source, model, *side) for side in sides)
        for name, region, tensor in held:
            tensor.copy_(source.read(name, region))
        began = time.perf_counter()
        refitting = Refit(held, wanted)
        planned = time.perf_counter()
        seconds = [_timed_push(refitting) for _ in range(pushes)]
        return Refitted(_compared(source, wanted, *sides[1]), refitting.traffic, planned - began, tuple(seconds))


def _check_ranks(from_ranks: Sequence[int], to_ranks: Sequence[int]) -> None:
    world = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if dist.is_initialized():  # by whoever calls, with a launcher or not
        world = dist.get_world_size()
    for option, ranks in (("--from-ranks", from_ranks), ("--to-ranks", to_ranks)):
        if not ranks or min(ranks) < 0 or len({*ranks}) != len(ranks):
            raise RequestError(f"{option} is {list(ranks)}: name at least one rank, none below 0, each once")
        if outside := [rank for rank in ranks if rank >= world]:
            raise RequestError(
                f"{option} names rank {outside[0]}, but there are {world} processes: start as many with torchrun "
                "--nproc-per-node"
            )
    if both := sorted({*from_ranks} & {*to_ranks}):
        raise RequestError(f"rank {both[0]} is in --from-ranks and in --to-ranks: give each rank one side")


def _memory(
    source: LogicalCheckpoint, model: ModelConfig, ranks: Sequence[int], parallel: ParallelConfig
) -> list[Held]:
    """Memory for what this rank has on one side."""
    if dist.get_rank() not in ranks:
        return []
    pieces = rank_shards(model, parallel, ranks.index(dist.get_rank()), len(ranks))
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    return memory_for(pieces, dtypes, current().torch_device)


def _timed_push(refitting: Refit) -> float:
    dist.barrier()
    began = time.perf_counter()
    refitting.push()
    current().synchronize()
    dist.barrier()
    return time.perf_counter() - began


def _compared(
    source: ConvertedCheckpoint, arrived: Sequence[Held], ranks: Sequence[int], parallel: ParallelConfig
) -> str:
    """The hash of what arrived, of each replica that of the checkpoint, whichever of its ranks hold a region.

    Raises:
        DamagedError: a tensor has another one.
    """
    expected = recorded_hashes(source.source, source) or shared_hashes(source, Processes())
    everyone = gathered([(name, region, _summand(source, name, region, tensor)) for name, region, tensor in arrived])
    replicas = len(ranks) // parallel.model_size
    for replica in range(replicas):
        of_replica = [rank for place, rank in enumerate(ranks) if place // parallel.tensor % replicas == replica]
        parts: dict[tuple[str, Region], int] = {}
        several = ((name, (name, region), part) for rank in of_replica for name, region, part in everyone[rank])
        unlike = {name for name, at, part in several if parts.setdefault(at, part) != part}
        found = _hashes(source, parts)
        if wrong := [name for name in expected if name in unlike or found[name] != expected[name]]:
            raise DamagedError(f"{wrong[0]}: the weights that arrived in replica {replica} are not the checkpoint's")
    return combine_hashes(expected)


def _summand(source: LogicalCheckpoint, name: str, region: Region, tensor: torch.Tensor) -> int:
    return partial_hash(source.tensors[name].shape, region, tensor.cpu())


def _hashes(source: LogicalCheckpoint, parts: Mapping[tuple[str, Region], int]) -> dict[str, str]:
    """Hashes of the tensors that are made up of parts, each once."""
    sums = dict.fromkeys(source.tensors, 0)
    for (name, _), part in parts.items():
        sums[name] += part
    return {name: tensor_hash(info, sums[name]) for name, info in source.tensors.items()}
