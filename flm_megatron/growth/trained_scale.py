"""How large trained weights and their second moments are, for new entries that start beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from flm_megatron.checkpoint.exchange.description import NamedRegion
from flm_megatron.checkpoint.exchange.live import read_all
from flm_megatron.checkpoint.logical import EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region
from flm_megatron.config.schema import GrowthConfig, ModelConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.growth.grown.checkpoint import axis_mean
from flm_megatron.growth.plan import TrainedScale
from flm_megatron.model.parameters import ParameterSpec, parameter_specs

BLOCK = 2**21
"""Values that are summed at a time: 16 MiB in float64."""


def trained_scale(
    source: LogicalCheckpoint, model: ModelConfig, growth: GrowthConfig, processes: Processes
) -> TrainedScale:
    """What `growth` needs to know of `source`, a checkpoint of `model`.

    The processes share the layers; all get the same numbers, which do not depend on how many they are.

    Raises:
        DamagedError: (on every process) a tensor cannot be read.
    """
    wanted = _wanted(source, model, growth)

    def share() -> list[float]:
        """The means of this process, every n-th."""
        return _means(source, wanted[processes.rank :: processes.size])

    shares = processes.together(share)
    return processes.on_first(lambda: _in_order(wanted, shares))


Wanted = tuple[str, ParameterSpec, int]
"""Name of a tensor, its parameter, and a layer of it: 0 where there are no layers."""


def _wanted(source: LogicalCheckpoint, model: ModelConfig, growth: GrowthConfig) -> list[Wanted]:
    """What is measured: weights that start at random values, second moments of all."""
    found = []
    for name, spec in parameter_specs(model).items():
        names = []
        if growth.new_scale == "trained" and spec.init_std:
            names.append(MASTER + name if MASTER + name in source.tensors else name)
        if growth.optimizer_state == "grow" and EXP_AVG_SQ + name in source.tensors:
            names.append(EXP_AVG_SQ + name)
        found += [(each, spec, layer) for each in names for layer in range(spec.shape[0] if spec.stacked else 1)]
    return found


def _in_order(wanted: Sequence[Wanted], shares: Sequence[Sequence[float]]) -> TrainedScale:
    """The means of all processes by tensor; of weights their square roots."""
    found = TrainedScale({}, {})
    for number, (tensor, spec, _) in enumerate(wanted):
        mean = shares[number % len(shares)][number // len(shares)]
        squares = tensor.startswith(EXP_AVG_SQ)
        into = found.exp_avg_sq if squares else found.rms
        into[spec.name] = (*into.get(spec.name, ()), mean if squares else math.sqrt(mean))
    return found


def _means(source: LogicalCheckpoint, wanted: Sequence[Wanted]) -> list[float]:
    """Mean of the second moments of each layer, or of its weights' squares, in blocks of whole rows and in float64."""
    blocks = [[*_blocks(tensor, spec, layer)] for tensor, spec, layer in wanted]
    sums: list[list[float]] = [[] for _ in wanted]
    places = [number for number, of in enumerate(blocks) for _ in of]

    def add(block: int, values: torch.Tensor) -> None:
        """Add the sum of a block's values."""
        number = places[block]
        flat = values.double().flatten()
        flat = flat if wanted[number][0].startswith(EXP_AVG_SQ) else flat.square()
        sums[number].append(axis_mean(flat, 0).item() * len(flat))

    read_all(source, [block for of in blocks for block in of], add)
    return [math.fsum(each) / sum(r.numel for _, r in of) for each, of in zip(sums, blocks, strict=True)]


def _blocks(tensor: str, spec: ParameterSpec, layer: int) -> Iterator[NamedRegion]:
    """A layer of a tensor in blocks of whole rows."""
    axis = int(spec.stacked)
    offsets, sizes = [0] * len(spec.shape), list(spec.shape)
    if spec.stacked:
        offsets[0], sizes[0] = layer, 1
    rows = max(1, BLOCK // math.prod(sizes[axis + 1 :]))
    for start in range(0, spec.shape[axis], rows):
        offsets[axis], sizes[axis] = start, min(rows, spec.shape[axis] - start)
        yield tensor, Region(tuple(offsets), tuple(sizes))
