"""The CPU and gloo."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import resource
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from flm_megatron.device.base import Copying, Device, Module, RandomState

PROCESS = Path("/proc/self")
KIB_PER_GIB = 2**20


class CpuDevice(Device):
    """The CPU of this host, in place of the GPU that megatron-core expects."""

    name = "cpu"
    backend = "gloo"
    start_method = "forkserver"
    random_state = RandomState(
        lambda *_, **__: torch.get_rng_state(), lambda state, *_, **__: torch.set_rng_state(state)
    )

    @property
    def torch_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def prepare(self) -> None:
        """Answer the engine's requests for CUDA with the CPU."""
        _install_adapter()

    def place(self, module: Module) -> Module:
        """The module as it is."""
        return module

    def engine_options(self) -> dict[str, object]:
        """No fusions (they are CUDA's), and pipeline outputs kept.

        With gloo a send still reads its tensor after the call has returned, so freeing the storage of a pipeline
        output would corrupt what the next rank receives.
        """
        return {
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "deallocate_pipeline_outputs": False,
        }

    def fp8_obstacle(self) -> str | None:
        """None: torch has the product for CPUs too, without a gain in speed."""
        return None

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def pin(self, memory: mmap.mmap) -> None:
        """All memory is the CPU's own."""

    def unpin(self, memory: mmap.mmap) -> None:
        """Nothing was done."""

    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Copying:
        """A CPU has nothing beside which it could copy: they are made before this returns."""
        for host, tensor in pairs:
            host.copy_(tensor)
        return _Made()

    def hold_changes(self) -> None:
        """No copies are under way."""

    def peak_memory_gib(self) -> float:
        """Largest resident set of this process, in GiB."""
        return _peak_resident_kib() / KIB_PER_GIB

    def reset_peak_memory(self) -> None:
        """Start the peak resident set anew (only Linux can: elsewhere the peak is that of the whole process)."""
        _give_back_freed_memory()
        control = PROCESS / "clear_refs"
        if control.exists():
            control.write_text("5")

    def hardware_name(self) -> str:
        """Model name of the processor."""
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
        return found.group(1).strip() if found else platform.processor() or platform.machine()


class _Made:
    """Copies that are made."""

    def wait(self) -> None:
        """Returns at once."""


def _give_back_freed_memory() -> None:
    """Return freed memory to the system, if the C library is glibc: it would count as held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_resident_kib() -> int:
    status = PROCESS / "status"
    if status.exists():
        # Not getrusage: its peak survives exec, so a small child would report the peak of what started it.
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)
        if found:
            return int(found.group(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


@cache
def _install_adapter() -> None:
    from flm_megatron.device.cpu_adapter import install

    install()
