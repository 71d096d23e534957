"""Loads any checkpoint into a model and its optimizer, and saves them as `torch_dist` folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.description import Held
from flm_megatron.checkpoint.exchange.live import Crossing, live_source
from flm_megatron.checkpoint.files.in_order import WORKERS, in_order
from flm_megatron.checkpoint.logical import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    LogicalCheckpoint,
    Region,
    TensorInfo,
    adam_step,
)
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.sharding.asynchronous import SaveHandle, writing_processes
from flm_megatron.checkpoint.sharding.optimizer_state import (
    placements_by_parameter,
    state_regions,
    state_slices,
)
from flm_megatron.checkpoint.sharding.placement import Placement, placements
from flm_megatron.checkpoint.sharding.shared_reading import RegionToFill, fill_shared
from flm_megatron.checkpoint.sharding.snapshot import BackgroundCopies, Stored, placed, prepare_buffer
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES, SourceRegion
from flm_megatron.checkpoint.torch_dist.writer import LARGEST_CHUNK, chunk_size
from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.device.chunks import SHARED_READ_BYTES
from flm_megatron.engine import parallel_state
from flm_megatron.engine.data_parallel import finish_gathering
from flm_megatron.engine.optimizer import initialise_state
from flm_megatron.engine.types import ModelChunk, Optimizer
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM


@dataclass(frozen=True)
class HeldRegion:
    """A region of a logical tensor and the memory of this process that holds it (a view of shape `region.sizes`).

    `stored` says whether this process, or one of its data-parallel peers if `shared`, stores it.
    """

    name: str
    info: TensorInfo
    region: Region
    tensor: torch.Tensor
    stored: bool
    shared: bool


@torch.no_grad()
def load_state(
    checkpoint: LogicalCheckpoint, chunks: Sequence[ModelChunk], optimizer: Optimizer | None = None, alone: bool = False
) -> None:
    """Fill model chunks, and the optimizer's masters, moments and step, from a checkpoint.

    Each process reads only the regions that it holds. Data-parallel peers, which hold the same weights, divide the
    reading among them, so all of them have to call, unless this replica loads `alone`.

    Where the checkpoint has no master, a master starts from the checkpoint's weights in the checkpoint's own precision;
    where it has no moments they are zero, and so is the step. fp32 parameters are their own masters. Rows of padding
    ids are zero. Learning rates and other settings of parameter groups are left alone.

    Of a checkpoint that lies in the memory of the ranks, all of the world have to call, or to `give`.

    Raises:
        RequestError: a tensor is missing or of a shape that does not fit the model; moments without their step.
        DamagedError: a tensor cannot be read.
    """
    if live_source(checkpoint) is not None:
        load_live_state(checkpoint, chunks, optimizer)
        return
    regions = _emptied(checkpoint, chunks, optimizer)
    group = None if alone else _peers()
    if group is not None:
        shared = (held for held in regions if held.shared)
        fill_shared((region for held in shared for region in _to_fill(held, checkpoint, SHARED_READ_BYTES)), group)
    own = (held for held in regions if group is None or not held.shared)
    _fill_all(region for held in own for region in _to_fill(held, checkpoint, BUFFER_BYTES))


@torch.no_grad()
def load_live_state(
    checkpoint: LogicalCheckpoint, chunks: Sequence[ModelChunk], optimizer: Optimizer | None = None
) -> Crossing:
    """`load_state` from a checkpoint that reads a live one, or is it; returns what that took.

    All ranks of the world must call, or `give`. Each gets what it holds itself, data-parallel peers too.

    Raises:
        RequestError: as `load_state`.
    """
    live = live_source(checkpoint)
    assert live is not None, "it lies in the memory of the ranks"
    began = time.perf_counter()
    regions = _emptied(checkpoint, chunks, optimizer)
    to_fill = [region for held in regions for region in _to_fill(held, checkpoint, SHARED_READ_BYTES)]
    for arrived in live.rounds([region.read for region in to_fill]):
        _fill_all(to_fill[number] for number in arrived)
    return Crossing(live.traffic, time.perf_counter() - began, live.moved.seconds)


def held_state(chunks: Sequence[ModelChunk], optimizer: Optimizer | None) -> list[Held]:
    """All that this process holds of a checkpoint of the model and (unless none) its optimizer, in the training's own
    memory: what it would store, and its copies of what data-parallel peers would. All ranks must call.

    Raises:
        RuntimeError: a rank is gone, where updated weights are yet to be gathered.
    """
    finish_gathering(chunks)
    held_here = placements(chunks)
    state = _optimizer_regions(optimizer, held_here) if optimizer is not None else ()
    return [(held.name, held.region, held.tensor) for held in (*_weight_regions(held_here), *state) if held.stored]


def _emptied(
    checkpoint: LogicalCheckpoint, chunks: Sequence[ModelChunk], optimizer: Optimizer | None
) -> list[HeldRegion]:
    """All regions to be filled from a checkpoint, which fits them; everything is zero before."""
    current().hold_changes()
    held_here = placements(chunks)
    for placement in held_here:
        _check_shape(checkpoint, placement)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    state = list(_optimizer_regions(optimizer, held_here, checkpoint)) if optimizer is not None else []
    return [*_weight_regions(held_here), *state]


def _fill_all(to_fill: Iterable[RegionToFill]) -> None:
    """Fill regions, in threads where the device does that."""
    if not current().fills_in_threads:
        for region in to_fill:
            _fill(region)
        return
    with ThreadPoolExecutor(WORKERS, "reading") as executor:
        for _ in in_order(executor, _fill, to_fill):
            pass


def save_state(
    path: str | Path,
    chunks: Sequence[ModelChunk],
    optimizer: Optimizer | None,
    manifest: Manifest,
    asynchronous: bool = False,
) -> SaveHandle:
    """Write a checkpoint of the model and (unless none) its optimizer; every process writes what it holds.

    Nothing is gathered: replicas of weights are divided over the data-parallel ranks, optimizer state is written
    by its owner. `manifest` says where they stand. With `asynchronous` everything is copied to memory of the host and
    written in the background: what is saved may change after the device's `hold_changes`. Call `wait()` on the result
    on every rank: it raises there if the save failed on any.

    Raises:
        RequestError: (without `asynchronous`) the destination exists or cannot be written.
    """
    processes = writing_processes()
    tensors, stored = stored_state(chunks, optimizer)
    copies = BackgroundCopies(stored) if asynchronous else None
    if copies is not None:
        found = [SourceRegion(name, region, _copied(copies, region, copy)) for name, region, copy in copies.regions]
    else:
        found = [SourceRegion(name, region, _getter(region, tensor)) for name, region, tensor in stored]
    shards = {shard_file(processes.rank): found}
    try:
        return SaveHandle(Path(path), tensors, shards, manifest, processes, copies.release if copies else None)
    except BaseException:
        if copies is not None:
            copies.release()
        raise


def shard_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"__{rank}_0.distcp"


def stored_state(
    chunks: Sequence[ModelChunk], optimizer: Optimizer | None
) -> tuple[dict[str, TensorInfo], list[Stored]]:
    """The tensors of which this process holds a region, and the regions that it stores.

    Those of a checkpoint of the model and (unless none) its optimizer, as views of the training's own memory. All ranks
    must call.
    """
    finish_gathering(chunks)
    held_here = placements(chunks)
    state = _optimizer_regions(optimizer, held_here) if optimizer is not None else ()
    regions = [*_weight_regions(held_here), *state]
    return {held.name: held.info for held in regions}, list(_own_shard(regions))


def prepare_asynchronous_save(chunks: Sequence[ModelChunk], optimizer: Optimizer | None) -> None:
    """Allocate the memory for copies of the state in the background, before the first save. All ranks must call."""
    prepare_buffer(placed(stored_state(chunks, optimizer)[1])[1])


def _getter(region: Region, tensor: torch.Tensor) -> Callable[[Region], torch.Tensor]:
    return lambda inside: tensor[inside.within(region).slices]


def _copied(copies: BackgroundCopies, region: Region, copy: torch.Tensor) -> Callable[[Region], torch.Tensor]:
    """Values of a region once it is copied; asked for while writing, so that all ranks hear of an error."""
    values = _getter(region, copy)

    def get(inside: Region) -> torch.Tensor:
        """Wait, and read."""
        copies.wait()
        return values(inside)

    return get


def _weight_regions(held_here: list[Placement]) -> Iterator[HeldRegion]:
    for placement in held_here:
        info = TensorInfo(placement.shape, placement.parameter.dtype)
        yield HeldRegion(placement.name, info, placement.region, placement.tensor, placement.main, True)


def _optimizer_regions(
    optimizer: Optimizer, held_here: list[Placement], checkpoint: LogicalCheckpoint | None = None
) -> Iterator[HeldRegion]:
    """Regions of masters and moments; with a checkpoint to load, the state is made ready for it first."""
    initialise_state(optimizer)
    if checkpoint is not None:
        step = adam_step(checkpoint)
        for group in optimizer.param_groups:
            group["step"] = step
    by_parameter = placements_by_parameter(held_here)
    for state in state_slices(optimizer):
        tensors = {MASTER: state.master, EXP_AVG: state.exp_avg, EXP_AVG_SQ: state.exp_avg_sq}
        if checkpoint is not None:
            if state.parameter.dtype == torch.float32:
                del tensors[MASTER]  # the parameter itself, filled as a weight
            for tensor in tensors.values():
                tensor.zero_()
        for state_region in state_regions(state, by_parameter):
            placement = state_region.placement
            info = TensorInfo(placement.shape, torch.float32)
            for prefix, flat in tensors.items():
                values = state_region.values(flat)
                name = prefix + placement.name
                yield HeldRegion(name, info, state_region.region, values, placement.main, not state.sharded)


def _peers() -> dist.ProcessGroup | None:
    """The ranks that hold the same weights as this one; none if there are no others."""
    group = parallel_state.get_data_parallel_group()
    return group if dist.get_world_size(group) > 1 else None


def _to_fill(held: HeldRegion, checkpoint: LogicalCheckpoint, largest: int) -> Iterator[RegionToFill]:
    """`held` in regions of at most `largest` bytes; none if it stays zero."""
    name = _source(held, checkpoint)
    if name is None:
        return
    for region in split_region(held.region, largest // held.tensor.element_size()):
        yield RegionToFill(held.tensor[region.within(held.region).slices], partial(checkpoint.read, name, region))


@torch.no_grad()  # of each thread
def _fill(region: RegionToFill) -> None:
    region.tensor.copy_(region.read())


def _source(held: HeldRegion, checkpoint: LogicalCheckpoint) -> str | None:
    """The tensor of the checkpoint that a region is read from; none for moments that the checkpoint does not have."""
    if held.name.startswith((EXP_AVG, EXP_AVG_SQ)):
        return held.name if held.name in checkpoint.tensors else None
    weight = held.name.removeprefix(MASTER)
    # fp32 weights are their own masters: both must come from one source.
    wants_master = held.tensor.dtype == torch.float32
    return MASTER + weight if wants_master and MASTER + weight in checkpoint.tensors else weight


def _check_shape(checkpoint: LogicalCheckpoint, placement: Placement) -> None:
    if placement.name not in checkpoint.tensors:
        raise RequestError(f"the checkpoint has no tensor {placement.name}, which the model needs")
    found = checkpoint.tensors[placement.name].shape
    # Checkpoints of Megatron-LM keep their padding rows.
    longer = len(found) == len(placement.shape) and found[1:] == placement.shape[1:] and found[0] > placement.shape[0]
    if found != placement.shape and not (longer and placement.padded):
        raise RequestError(
            f"{placement.name} has shape {found} in the checkpoint and {placement.shape} in the model: give the model"
            " the checkpoint's shape, or grow the checkpoint"
        )


def _own_shard(regions: list[HeldRegion]) -> Iterator[Stored]:
    """What this process stores: regions that it alone holds, and its shard of those that data-parallel peers share."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    total = sum(held.tensor.nbytes for held in regions if held.stored and held.shared)
    position = 0
    for held in regions:
        if not held.stored:
            continue
        limit = chunk_size(total, size) if held.shared else LARGEST_CHUNK
        for region in split_region(held.region, limit // held.tensor.element_size()):
            values = held.tensor[region.within(held.region).slices]
            if not held.shared or position * size // max(total, 1) == rank:
                yield held.name, region, values
            position += values.nbytes if held.shared else 0


def chunks_to_evaluate(checkpoint: LogicalCheckpoint, stage: StageConfig, alone: bool = False) -> list[TeleFLM]:
    """This rank's chunks of the stage's model with a checkpoint's weights, in evaluation mode, under the current
    layout.

    `alone` is as in `load_state`. Raises DamagedError if the checkpoint cannot be read.
    """
    from flm_megatron.model.build import build_model

    with torch.no_grad():
        chunks = [current().place(chunk).eval() for chunk in build_model(stage.model, stage)]
        load_state(checkpoint, chunks, alone=alone)
    return chunks
