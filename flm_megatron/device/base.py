"""What a device offers to the rest of the program, and the engine version that the devices were made for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    import mmap

    import torch

ENGINE_VERSION = "0.16.1"


class Device(ABC):
    """The processor of this process: one of a CPU host, or one GPU."""

    name: str
    """`cpu` or `cuda`."""
    backend: str
    """Backend of torch.distributed: `gloo` or `nccl`."""
    start_method: str
    """How processes are started here: `forkserver`, or `spawn` where the device must not be forked."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where this process puts its tensors (on CUDA the GPU numbered LOCAL_RANK)."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the process ready for megatron-core; call it before the first megatron import, any number of times.

        Raises:
            RequestError: megatron-core is missing, or is not the version that this program was made for.
        """

    @abstractmethod
    def engine_options(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that this device needs."""

    @abstractmethod
    def fp8_obstacle(self) -> str | None:
        """Why products of FP8 matrices (`torch._scaled_mm`) cannot run here; none if they can."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    @abstractmethod
    def pin(self, memory: mmap.mmap) -> None:
        """Make copies from the device into this host memory as fast as they can be, until `unpin`."""

    @abstractmethod
    def unpin(self, memory: mmap.mmap) -> None:
        """Let go of memory that `pin` has locked."""

    @abstractmethod
    def peak_memory_gib(self) -> float:
        """Largest memory held since the last reset, in GiB: the allocator's on CUDA, the process's on a CPU."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start the peak of `peak_memory_gib` anew from what is held now."""

    @abstractmethod
    def hardware_name(self) -> str:
        """Name of the processor as the system gives it, for `hardware.find_hardware` and for reports."""


def require_engine() -> None:
    """Check that the installed megatron-core is `ENGINE_VERSION`, without importing it.

    Raises:
        RequestError: it is another version, or it is not there.
    """
    fix = f"install it with: pip install megatron-core=={ENGINE_VERSION}"
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise RequestError(f"megatron-core is not installed; {fix}") from None
    if installed != ENGINE_VERSION:
        raise RequestError(f"megatron-core {installed} is installed, but {ENGINE_VERSION} is needed; {fix}")
