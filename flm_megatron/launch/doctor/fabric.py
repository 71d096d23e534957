"""How the host's GPUs are joined, to each other and to other hosts: NVLink, adapters, their ports, the network card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.config.schema import RunConfig
from flm_megatron.launch.doctor.findings import Finding
from flm_megatron.launch.doctor.nvidia_smi import Topology

SYS, PROC = Path("/sys"), Path("/proc")


@dataclass(frozen=True)
class Port:
    """A port of a network adapter, as the kernel shows it below /sys/class/infiniband."""

    adapter: str
    number: str
    state: str
    """Such as `ACTIVE` or `DOWN`."""
    rate: str
    """Such as `400 Gb/sec`."""
    layer: str
    """`InfiniBand` or `Ethernet`, which is RoCE."""

    def __str__(self) -> str:
        return f"{self.adapter}:{self.number}"


def ports(sys: Path = SYS) -> list[Port]:
    """The ports of all adapters of this host."""
    folders = sorted(sys.glob("class/infiniband/*/ports/*"))
    return [
        Port(
            folder.parts[-3],
            folder.name,
            read(folder / "state").partition(":")[2].strip() or "unknown",
            read(folder / "rate").partition("(")[0].strip() or "unknown",
            read(folder / "link_layer") or "unknown",
        )
        for folder in folders
    ]


def read(path: Path) -> str:
    """A small file of the kernel's; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def selected(found: list[Port], choice: str) -> list[Port]:
    """The ports that NCCL takes for a value of `NCCL_IB_HCA`.

    A list of beginnings of names, or of names after `=`; all but those after `^`; a name may have `:PORT`.
    """
    without, exact = choice.startswith("^"), choice.lstrip("^").startswith("=")
    names = [each.partition(":")[::2] for each in choice.lstrip("^=").split(",") if each]
    if not names:
        return found

    def is_named(port: Port) -> bool:
        """Whether the list has it."""
        return any(
            (port.adapter == name if exact else port.adapter.startswith(name)) and number in ("", port.number)
            for name, number in names
        )

    return [port for port in found if is_named(port) != without]


def adapters(found: list[Port], sys: Path = SYS, proc: Path = PROC) -> Iterator[Finding]:
    """Whether the adapters that NCCL would take are up, equal, and can reach the GPUs' memory."""
    if not found:
        return
    choice = os.environ.get("NCCL_IB_HCA", "")
    if os.environ.get("NCCL_IB_DISABLE", "0") != "0":
        yield Finding("ok", "adapters", f"NCCL_IB_DISABLE is set: TCP, though there are {_names(found)}")
        return
    taken = selected(found, choice)
    if not taken:
        text = f"NCCL_IB_HCA is {choice}, but the adapters are {_names(found)}: NCCL would take TCP"
        yield Finding("warn", "adapters", text)
        return
    down = [port for port in taken if port.state != "ACTIVE"]
    if down:
        states = ", ".join(f"{port} {port.state}" for port in down)
        fix = "look at cable and switch, or leave them out of NCCL_IB_HCA"
        yield Finding("warn", "adapters", f"{states}: {fix}")
    up = [port for port in taken if port.state == "ACTIVE"]
    for what, values in (("rates", {port.rate for port in up}), ("kinds", {port.layer for port in up})):
        if len(values) > 1:
            text = f"{what} differ ({', '.join(sorted(values))}): list those for training in NCCL_IB_HCA"
            yield Finding("warn", "adapters", text)
    if not _reach_gpus(sys, proc):
        text = "no GPUDirect RDMA, so NCCL copies through the host's memory: modprobe nvidia_peermem"
        yield Finding("warn", "adapters", text)
    if up and not down:
        yield Finding("ok", "adapters", f"{len(up)} port(s) up, {up[0].rate}, {up[0].layer}: {_names(up)}")


def _names(found: list[Port]) -> str:
    return ", ".join(str(port) for port in found)


def _reach_gpus(sys: Path, proc: Path) -> bool:
    """Whether adapters can read GPUs' memory: by NVIDIA's module, or by DMA-BUF, which the open driver has."""
    return (sys / "module" / "nvidia_peermem").exists() or "Open Kernel Module" in read(proc / "driver/nvidia/version")


def joined(run: RunConfig, topology: Topology, ranks_here: int, several_hosts: bool) -> Iterator[Finding]:
    """Whether GPUs of a tensor-parallel group have NVLink, and every GPU an adapter near it."""
    slow = False
    for stage in run.stages:
        size = min(stage.parallel.tensor, ranks_here)
        ways = {
            way
            for (one, other), way in topology.links.items()
            if other.startswith("GPU")
            and _number(one) // size == _number(other) // size
            and max(_number(one), _number(other)) < ranks_here
        }
        without = sorted(way for way in ways if not way.startswith("NV"))
        if size > 1 and without:
            slow = True
            text = f"stage {stage.name}: tensor groups of {size} GPUs are joined by {', '.join(without)}, not by NVLink"
            yield Finding("warn", "topology", f"{text}: their traffic is in every layer; lower parallel.tensor")
    own = [f"GPU{number}" for number in range(ranks_here)]
    far = [name for name in own if several_hosts and topology.nearest(name) == "SYS"]
    if far:
        text = (
            f"{', '.join(far)}: no adapter nearer than the other socket; look at the slots, or bind ranks by NUMA node"
        )
        yield Finding("warn", "topology", text)
    if topology.links and not slow and not far:
        ways = {way for (_, other), way in topology.links.items() if other.startswith("GPU")}
        yield Finding("ok", "topology", f"GPUs joined by {', '.join(sorted(ways)) or 'nothing: there is one'}")


def _number(gpu: str) -> int:
    return int(re.sub(r"\D", "", gpu))


def card(sys: Path = SYS) -> tuple[list[Finding], dict[str, str]]:
    """The card of the first contact and of gloo, if it is named: a finding if it is down, and its MTU and speed."""
    name = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    folder = sys / "class" / "net" / name
    if not name or not folder.is_dir():
        return [], {}  # `network` says that it is not there
    found = []
    if read(folder / "operstate") == "down":
        found.append(Finding("stop", "network", f"the card {name} is down: ip link set {name} up"))
    facts = {f"MTU of {name}": read(folder / "mtu")}
    speed = read(folder / "speed")
    if speed.isdigit():
        facts[f"speed of {name}"] = f"{speed} Mb/s"
    return found, {key: value for key, value in facts.items() if value}
