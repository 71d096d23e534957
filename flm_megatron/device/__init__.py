"""The device of this process. Nothing outside this package tests for CUDA.

`current()` is the device in use; `cpu` and `cuda` implement it.
"""

from __future__ import annotations

from functools import cache

from flm_megatron.device.base import Device

__all__ = ["Device", "current"]


@cache
def current() -> Device:
    """CUDA where torch sees a GPU, else the CPU; the same object at every call."""
    import torch

    if torch.cuda.is_available():
        from flm_megatron.device.cuda import CudaDevice

        return CudaDevice()
    from flm_megatron.device.cpu import CpuDevice

    return CpuDevice()
