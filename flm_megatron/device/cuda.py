"""CUDA and NCCL."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flm_megatron.device.base import Copying, Device, Module

GIB = 2**30
FP8_CAPABILITY = (8, 9)


class CudaDevice(Device):
    """One GPU of this host, chosen by LOCAL_RANK (0 without a launcher)."""

    name = "cuda"
    backend = "nccl"
    start_method = "spawn"

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def torch_device(self) -> torch.device:
        """The GPU numbered LOCAL_RANK."""
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def prepare(self) -> None:
        """Make this process's GPU the current one.

        Before Blackwell, communication overlaps with computation as the engine schedules it only if all kernels
        go through one hardware queue; a setting of the environment is left as it is.
        """
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(self.torch_device)

    def place(self, module: Module) -> Module:
        """The module, moved to the GPU."""
        return module.to(self.torch_device)

    def engine_options(self) -> dict[str, object]:
        """Fusions that need no more than torch."""
        return {
            "use_cpu_initialization": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": True,
            "bias_activation_fusion": True,
            "deallocate_pipeline_outputs": True,
        }

    def fp8_obstacle(self) -> str | None:
        """FP8 units came with Ada (compute capability 8.9) and Hopper; AMD's formats are not offered."""
        if torch.version.hip:
            return "only NVIDIA's FP8 formats are offered"
        capability = torch.cuda.get_device_capability(self.torch_device)
        if capability < FP8_CAPABILITY:
            found = ".".join(map(str, capability))
            return f"{self.hardware_name()} has compute capability {found}, FP8 needs 8.9 or more"
        return None

    def processors(self) -> int:
        """Multiprocessors of this GPU (132 of an H100)."""
        return torch.cuda.get_device_properties(self.torch_device).multi_processor_count

    def synchronize(self) -> None:
        """Wait for the GPU's queues."""
        torch.cuda.synchronize(self.torch_device)

    def pin(self, memory: mmap.mmap) -> None:
        """Register the pages with the driver, which otherwise copies through a small buffer of its own."""
        with torch.cuda.device(self.torch_device):  # a new thread would begin with GPU 0, and take memory there
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), 0))

    def unpin(self, memory: mmap.mmap) -> None:
        """Take them from the driver before they are unmapped."""
        with torch.cuda.device(self.torch_device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(memory)))

    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Copying:
        """On a stream of their own, by the GPU's copy engine; memory that is freed meanwhile is kept for them."""
        side = self._side = self._side or torch.cuda.Stream(self.torch_device)
        side.wait_stream(torch.cuda.current_stream(self.torch_device))
        copied = torch.cuda.Event()
        with torch.cuda.stream(side):
            for host, tensor in pairs:
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(side)
            copied.record(side)
        self._copied = copied
        return _OnStream(copied, self.torch_device)

    def hold_changes(self) -> None:
        """The current stream waits for them."""
        if self._copied is not None:
            torch.cuda.current_stream(self.torch_device).wait_event(self._copied)
            self._copied = None

    def peak_memory_gib(self) -> float:
        """Largest memory that torch's allocator has held, in GiB."""
        return torch.cuda.max_memory_allocated(self.torch_device) / GIB

    def reset_peak_memory(self) -> None:
        """Start the allocator's peak anew."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def hardware_name(self) -> str:
        """The driver's name of the GPU, such as `NVIDIA H100 80GB HBM3`."""
        return torch.cuda.get_device_name(self.torch_device)


@dataclass(frozen=True)
class _OnStream:
    """Copies that are made when the stream has come to `copied`."""

    copied: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        """Wait for the event."""
        with torch.cuda.device(self.device):  # as for `pin`
            self.copied.synchronize()


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
