"""The host itself: its clock, the power setting of its CPUs, its NUMA nodes, and the IOMMU before its GPUs."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.config.schema import RunConfig
from flm_megatron.device import current
from flm_megatron.launch.doctor.fabric import PROC, SYS, adapters, card, joined, ports, read
from flm_megatron.launch.doctor.findings import Finding
from flm_megatron.launch.doctor.nvidia_smi import Gpu, Silent, ask, gpus, read_topology, remapped_rows, settings

TIMEX_BYTES = 512
"""More than the kernel's struct timex has."""
CLOCK_ERROR = 5
"""What adjtimex(2) gives for a clock that nothing holds."""


def examine_machine(run: RunConfig, ranks_here: int, several_hosts: bool) -> Iterator[Finding]:
    """All findings on this host's hardware. A host without GPUs is told nothing of what it lacks."""
    yield from time_service(several_hosts)
    yield from card()[0]
    try:
        found = gpus()
        if found:
            yield from settings(found)
            yield from remapped_rows()
            yield from joined(run, read_topology(ask("topo", "-m")), ranks_here, several_hosts)
    except (Silent, OSError) as error:
        found = []
        yield Finding("stop" if current().name != "cpu" else "warn", "GPUs", str(error))
    if found or current().name != "cpu":
        if several_hosts:
            yield from adapters(ports())
        yield from processors(found)


def machine_facts() -> dict[str, str]:
    """What should be equal on all hosts, though a run goes where it is not: driver, GPUs, adapters, card."""
    facts = card()[1]
    try:
        found = gpus()
    except (Silent, OSError):
        found = []  # a finding says why
    if found:
        names = [each.values["name"] for each in found]
        facts["driver"] = found[0].values["driver_version"]
        facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    up = [port.rate for port in ports() if port.state == "ACTIVE"]
    if up:
        facts["adapters"] = ", ".join(f"{up.count(rate)} x {rate}" for rate in dict.fromkeys(up))
    return facts


def time_service(several_hosts: bool) -> Iterator[Finding]:
    """Whether a time service holds this host's clock, by which logs of several hosts are compared."""
    if not several_hosts:
        return
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        return  # another C library
    if state == CLOCK_ERROR:
        yield Finding("warn", "time service", "nothing holds this clock: start chrony or systemd-timesyncd")
    elif state >= 0:
        yield Finding("ok", "time service", "the clock is held")


def processors(found: list[Gpu], sys: Path = SYS, proc: Path = PROC) -> Iterator[Finding]:
    """What slows down the ranks' own work and their copies to GPUs."""
    wrong = [*governor(sys), *numa(sys, proc), *iommu(found, sys)]
    yield from wrong
    nodes = len(list(sys.glob("devices/system/node/node[0-9]*")))
    if not wrong and nodes:
        yield Finding("ok", "processors", f"{nodes} NUMA node(s), no setting that slows ranks down")


def governor(sys: Path = SYS) -> Iterator[Finding]:
    """CPUs that save power: ranks that start kernels late leave GPUs idle."""
    chosen = {read(path) for path in sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    if chosen & {"powersave", "conservative"}:
        text = f"CPUs are governed by {', '.join(sorted(chosen - {''}))}: cpupower frequency-set -g performance"
        yield Finding("warn", "processors", text)


def numa(sys: Path = SYS, proc: Path = PROC) -> Iterator[Finding]:
    """Pages that the kernel moves between NUMA nodes, and ranks that it moves."""
    nodes = sorted(sys.glob("devices/system/node/node[0-9]*"))
    if len(nodes) < 2:
        return
    if read(proc / "sys/kernel/numa_balancing") not in ("", "0"):
        text = "the kernel moves pages between NUMA nodes while ranks use them: sysctl kernel.numa_balancing=0"
        yield Finding("warn", "processors", text)
    own = os.sched_getaffinity(0)
    if sum(bool(own & cpus(read(node / "cpulist"))) for node in nodes) > 1:
        fix = "torchrun --numa-binding node, srun --cpu-bind=ldoms, or numactl"
        yield Finding("warn", "processors", f"{len(nodes)} NUMA nodes, and this rank may run on any: {fix}")


def cpus(text: str) -> set[int]:
    """The numbers in a list as the kernel writes it: `0-3,8`."""
    pairs = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {number for first, last in pairs for number in range(int(first), int(last or first) + 1)}


def iommu(found: list[Gpu], sys: Path = SYS) -> Iterator[Finding]:
    """GPUs whose addresses an IOMMU translates: copies between them, and to adapters, go through the host."""
    folder = sys / "bus" / "pci" / "devices"
    # nvidia-smi writes eight digits of the domain, the kernel four.
    ids = {each.index: each.values["pci.bus_id"].lower()[-12:] for each in found}
    which = [index for index, bus in ids.items() if read(folder / bus / "iommu_group" / "type").startswith("DMA")]
    if which:
        text = f"an IOMMU translates for GPU {', '.join(which)}, so they copy to each other through the host"
        yield Finding("warn", "processors", f"{text}: boot with iommu=pt")
