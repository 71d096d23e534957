"""Environment variables of a run on a cluster, each with the reason it is set."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable. `fabric` names the networks it is for; none means any."""

    name: str
    value: str
    why: str
    gpu: bool = True
    network: bool = False
    fabric: tuple[str, ...] = ()


FABRICS = ("infiniband", "roce", "tcp")

VARIABLES = (
    Variable("OMP_NUM_THREADS", "1", "CPU threads of each process: the processes share the cores.", gpu=False),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "One hardware queue, so that communication starts in the order it was issued and hides behind the matrix "
        "multiplications; megatron-core counts on it up to Hopper.",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "Allocator segments that grow, against fragmentation near the memory limit.",
    ),
    Variable(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "A collective past its timeout ends the process instead of hanging."
    ),
    Variable(
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "2000",
        "The last collectives of every rank are kept, and dumped when one times out.",
    ),
    Variable("NCCL_DEBUG", "WARN", "NCCL speaks of errors only; INFO shows which network it chose.", network=True),
    Variable(
        "NCCL_IB_HCA",
        "mlx5",
        "Adapters for the data: all whose name begins so. List them (=mlx5_0,mlx5_1) where some are for storage.",
        network=True,
        fabric=("infiniband", "roce"),
    ),
    Variable(
        "NCCL_IB_TIMEOUT",
        "22",
        "Wait of an adapter for an acknowledgement, 4.096 us x 2^22 = 17 s: a flapping link is outlived.",
        network=True,
        fabric=("infiniband", "roce"),
    ),
    Variable(
        "NCCL_IB_RETRY_CNT",
        "7",
        "Attempts before the connection is given up; 7 is the most.",
        network=True,
        fabric=("infiniband", "roce"),
    ),
    Variable(
        "NCCL_IB_QPS_PER_CONNECTION",
        "4",
        "Queue pairs of a connection: a routed fabric spreads them over more than one path.",
        network=True,
        fabric=("infiniband", "roce"),
    ),
    Variable(
        "NCCL_IB_GID_INDEX",
        "3",
        "RoCE: the address table's entry for RoCE v2 over IPv4; `show_gids` lists them.",
        network=True,
        fabric=("roce",),
    ),
    Variable(
        "NCCL_IB_TC",
        "106",
        "RoCE: traffic class, DSCP 26 with ECN: the switches have to treat it as lossless (ask for their value).",
        network=True,
        fabric=("roce",),
    ),
    Variable("NCCL_IB_DISABLE", "1", "No InfiniBand or RoCE: TCP sockets.", network=True, fabric=("tcp",)),
)
NCCL_INTERFACE = "Card for NCCL's first contact (and its data on TCP); without it NCCL takes the first that is up."
GLOO_INTERFACE = "Card for gloo, which saves checkpoints; without it gloo takes the one of the host's name."


def environment(gpu: bool, nodes: int, fabric: str, interface: str | None) -> list[Variable]:
    """Variables of a run on `nodes` nodes, in the order they are printed; `interface` is a network card's name."""
    several = nodes > 1
    chosen = [
        each
        for each in VARIABLES
        if (gpu or not each.gpu) and (several or not each.network) and (not each.fabric or fabric in each.fabric)
    ]
    if interface and several:
        if gpu:
            chosen.append(Variable("NCCL_SOCKET_IFNAME", interface, NCCL_INTERFACE))
        chosen.append(Variable("GLOO_SOCKET_IFNAME", interface, GLOO_INTERFACE))
    return chosen


def shutdown_timeout(seconds: int) -> Variable:
    """Seconds that torchrun waits between SIGTERM and SIGKILL."""
    why = "Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL, to finish the step and save."
    return Variable("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds), why)


def as_shell(variables: list[Variable]) -> str:
    """Export lines, each under its reason."""
    return "\n".join(f"{_comment(each)}\nexport {each.name}={shlex.quote(each.value)}" for each in variables)


def as_yaml(variables: list[Variable]) -> str:
    """Entries of a container's `env`, each under its reason."""
    return "\n".join(f'{_comment(each)}\n- {{name: {each.name}, value: "{each.value}"}}' for each in variables)


def _comment(variable: Variable) -> str:
    return textwrap.fill(variable.why, 100, initial_indent="# ", subsequent_indent="# ")
