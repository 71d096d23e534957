"""Time of collectives and transfers, worked out by hand for a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.planner.cost.communication import bandwidth, data_time, gather_time, pipeline_time, tensor_time
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import Efficiency, Machine, find_machine

MACHINE = replace(
    find_machine("h100"),
    node_size=8,
    intra_gb_per_s=400.0,
    inter_gb_per_s=40.0,
    latency_s=0.5,
    efficiency=Efficiency(intra=0.5, inter=0.25),
)
"""200e9 bytes a second between ranks of a node, 10e9 a second and rank between nodes."""
SIZE = 6e10


def workload(tensor: int = 1, pipeline: int = 1, data: int = 1) -> Workload:
    """One step of eight samples."""
    model = ModelConfig(num_layers=8, hidden_size=64, ffn_hidden_size=96, num_attention_heads=16, vocab_size=128)
    return Workload(model, 32, 8, 1, ParallelConfig(tensor=tensor, pipeline=pipeline), data)


def seconds(value: float) -> object:
    """Equal but for rounding."""
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "in_node", "expected"),
    [
        (8, 8, 200e9),  # one node
        (2, 8, 200e9),
        (16, 8, 80e9),  # eight cards between two nodes
        (9, 8, 80e9),
        (64, 2, 20e9),
        (64, 1, 10e9),  # each rank in a node of its own
    ],
)
def test_bandwidth_of_a_ring(ranks: int, in_node: int, expected: float) -> None:
    assert bandwidth(MACHINE, ranks, in_node) == seconds(expected)


def test_a_network_faster_than_the_node_is_held_up_by_the_node() -> None:
    fast = replace(MACHINE, inter_gb_per_s=4000.0)
    assert bandwidth(fast, 16, 8) == seconds(200e9)
    assert bandwidth(fast, 16, 1) == seconds(1000e9)  # nothing passes inside a node


@pytest.mark.parametrize(("ranks", "expected"), [(1, 0.0), (2, 0.5 + 3e10 / 200e9), (4, 0.5 + 4.5e10 / 200e9)])
def test_a_gather_passes_on_all_but_one_share(ranks: int, expected: float) -> None:
    assert gather_time(MACHINE, SIZE, ranks, 8) == seconds(expected)


@pytest.mark.parametrize(
    ("tensor", "expected"), [(1, 0.0), (8, 0.5 + SIZE * 7 / 8 / 200e9), (16, 0.5 + SIZE * 15 / 16 / 80e9)]
)
def test_tensor_groups_fill_a_node_first(tensor: int, expected: float) -> None:
    assert tensor_time(workload(tensor=tensor), MACHINE, SIZE) == seconds(expected)


@pytest.mark.parametrize(
    ("tensor", "data", "expected"),
    [
        (1, 8, 0.5 + SIZE * 7 / 8 / 200e9),  # a node
        (4, 2, 0.5 + SIZE / 2 / 200e9),  # two replicas in a node
        (4, 8, 0.5 + SIZE * 7 / 8 / 20e9),  # two in each of four nodes
        (8, 8, 0.5 + SIZE * 7 / 8 / 10e9),  # one in each node
        (16, 4, 0.5 + SIZE * 3 / 4 / 10e9),  # half of one in each node
    ],
)
def test_data_groups_have_what_tensor_groups_leave_of_a_node(tensor: int, data: int, expected: float) -> None:
    assert data_time(workload(tensor=tensor, data=data), MACHINE, SIZE) == seconds(expected)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "rate"),
    [(1, 2, 1, 200e9), (2, 2, 2, 200e9), (2, 2, 4, 10e9), (8, 2, 1, 10e9)],
    ids=["a part of a node", "a node", "two nodes", "tensor over a node"],
)
def test_a_transfer_stays_in_the_node_if_the_whole_job_does(tensor: int, pipeline: int, data: int, rate: float) -> None:
    assert pipeline_time(workload(tensor, pipeline, data), MACHINE, SIZE) == seconds(0.5 + SIZE / rate)


def test_a_machine_without_a_link_in_the_node_uses_its_network() -> None:
    apart: Machine = replace(MACHINE, intra_gb_per_s=0.0)
    assert pipeline_time(workload(pipeline=2), apart, SIZE) == seconds(0.5 + SIZE / 10e9)
