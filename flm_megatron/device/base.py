"""What a device offers to the rest of the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import mmap

    import torch
    from torch import nn


Module = TypeVar("Module", bound="nn.Module")


class RandomState(NamedTuple):
    """The device's random-number generator, with the arguments of megatron-core's functions for CUDA's."""

    get: Callable[..., torch.Tensor]
    set: Callable[..., None]


class Copying(Protocol):
    """Copies that are under way."""

    def wait(self) -> None:
        """Return when they are made; may be called from any thread, and repeatedly."""


class Device(ABC):
    """The processor of this process: one of a CPU host, or one GPU."""

    name: str
    """`cpu` or `cuda`."""
    backend: str
    """Backend of torch.distributed: `gloo` or `nccl`."""
    start_method: str
    """How processes are started here: `forkserver`, or `spawn` where the device must not be forked."""
    fills_in_threads: bool = True
    """Whether tensors may be filled by several threads at once."""
    has_values: bool = True
    """Whether tensors hold numbers; without them no decision can depend on any."""
    random_state: RandomState | None = None
    """What replaces CUDA's generator; none on CUDA."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where this process puts its tensors (on CUDA the GPU numbered LOCAL_RANK)."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the process ready for this device, before megatron-core is imported; may be called repeatedly."""

    @abstractmethod
    def place(self, module: Module) -> Module:
        """The module with its parameters and buffers on this device."""

    @abstractmethod
    def engine_options(self) -> dict[str, object]:
        """Fields of megatron-core's TransformerConfig that this device needs."""

    @abstractmethod
    def fp8_obstacle(self) -> str | None:
        """Why products of FP8 matrices (`torch._scaled_mm`) cannot run here; none if they can."""

    def processors(self) -> int:
        """How many programs of a kernel that fill a processor each run at a time: multiprocessors of a GPU, else 1."""
        return 1

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    @abstractmethod
    def pin(self, memory: mmap.mmap) -> None:
        """Make copies from the device into this host memory as fast as possible, until `unpin`."""

    @abstractmethod
    def unpin(self, memory: mmap.mmap) -> None:
        """Release memory that `pin` has locked."""

    @abstractmethod
    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Copying:
        """Begin to copy the second of each pair into the first, memory of the host that `pin` has locked.

        The copies hold what the work queued so far leaves. What is queued later runs beside them: it may change what
        they read after `hold_changes`.
        """

    @abstractmethod
    def hold_changes(self) -> None:
        """Let work that is queued from now on wait for the copies under way; the host does not wait."""

    @abstractmethod
    def peak_memory_gib(self) -> float:
        """Largest memory held since the last reset, in GiB: the allocator's on CUDA, the process's on a CPU."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Restart the peak of `peak_memory_gib` from the memory held now."""

    @abstractmethod
    def hardware_name(self) -> str:
        """Name of the processor as the system gives it, for `hardware.find_hardware` and for reports."""
