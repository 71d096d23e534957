"""Time of collectives and transfers, by where their ranks lie.

Ranks are numbered tensor first, then data, then pipeline, as megatron-core does.
"""

from __future__ import annotations

from collections.abc import Sequence

from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import Machine


def gather_time(machine: Machine, size: float, ranks: int, ranks_per_node: int) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes (whole tensor) over `ranks`, in rings.

    Every rank passes on (n-1)/n of the whole. Between nodes the group uses the network of all its ranks in a node.
    """
    if ranks == 1:
        return 0.0
    return machine.latency_s + size * (ranks - 1) / ranks / bandwidth(machine, ranks, ranks_per_node)


def bandwidth(machine: Machine, ranks: int, ranks_per_node: int) -> float:
    """Bytes per second of a ring over `ranks`, `ranks_per_node` of them in each node."""
    intra = machine.intra_gb_per_s * 1e9 * machine.efficiency.intra
    if ranks <= ranks_per_node:
        return intra
    inter = machine.inter_gb_per_s * 1e9 * machine.efficiency.inter * ranks_per_node
    return min(intra, inter) if ranks_per_node > 1 else inter


def tensor_time(work: Workload, machine: Machine, size: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes over the tensor group."""
    return gather_time(machine, size, work.parallel.tensor, min(work.parallel.tensor, machine.node_size))


def data_time(work: Workload, machine: Machine, size: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes over the data group."""
    in_node = min(work.data, max(1, machine.node_size // work.parallel.tensor))
    return gather_time(machine, size, work.data, in_node)


def pipeline_time(work: Workload, machine: Machine, size: float) -> float:
    """Seconds to send `size` bytes to the next pipeline rank."""
    return transfer_time(machine, size, work.world_size <= machine.node_size)


def group_time(machine: Machine, size: float, ranks: Sequence[int]) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes over global ranks, wherever they lie."""
    nodes = len({rank // machine.node_size for rank in ranks})
    return gather_time(machine, size, len(ranks), -(-len(ranks) // nodes))


def transfer_time(machine: Machine, size: float, same_node: bool) -> float:
    """Seconds to send `size` bytes from one rank to another."""
    link = machine.intra_gb_per_s * machine.efficiency.intra if same_node else 0.0
    link = link or machine.inter_gb_per_s * machine.efficiency.inter
    return machine.latency_s + size / (link * 1e9)
