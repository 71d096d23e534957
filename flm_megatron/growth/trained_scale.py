"""How large trained weights and their second moments are, for new entries that start beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        return [_mean(source, *each) for each in wanted[processes.rank :: processes.size]]

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


def _mean(source: LogicalCheckpoint, tensor: str, spec: ParameterSpec, layer: int) -> float:
    """Mean of a layer's second moments, or of its weights' squares, in blocks of whole rows and in float64."""
    axis = int(spec.stacked)
    offsets, sizes = [0] * len(spec.shape), list(spec.shape)
    if spec.stacked:
        offsets[0], sizes[0] = layer, 1
    rows = max(1, BLOCK // math.prod(sizes[axis + 1 :]))
    numel, sums = math.prod(sizes), []
    for start in range(0, spec.shape[axis], rows):
        offsets[axis], sizes[axis] = start, min(rows, spec.shape[axis] - start)
        values = source.read(tensor, Region(tuple(offsets), tuple(sizes))).double().flatten()
        values = values if tensor.startswith(EXP_AVG_SQ) else values.square()
        sums.append(axis_mean(values, 0).item() * len(values))
    return math.fsum(sums) / numel
