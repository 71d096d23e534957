"""The device of this process. Nothing outside this package tests for CUDA.

`current()` is the device in use; `cpu` and `cuda` implement it, and `rehearsed`, which computes nothing.
"""

from __future__ import annotations

from flm_megatron.device.base import Device

__all__ = ["Device", "current", "use"]

_current: Device | None = None


def current() -> Device:
    """CUDA where torch sees a GPU, else the CPU; the same object at every call."""
    global _current
    if _current is None:
        _current = _found()
    return _current


def use(device: Device) -> Device:
    """Let this be the device of the process, in place of the one before, which is returned."""
    global _current
    before, _current = current(), device
    return before


def _found() -> Device:
    import torch

    if torch.cuda.is_available():
        from flm_megatron.device.cuda import CudaDevice

        return CudaDevice()
    from flm_megatron.device.cpu import CpuDevice

    return CpuDevice()
