"""The table of accelerators is found by short names and by torch's names of devices."""

from __future__ import annotations

import pytest

from flm_megatron.device.hardware import find_hardware, known_hardware

NAMES = {
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H800": "h800",
    "NVIDIA H200": "h200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "AMD Instinct MI250X": "mi250x",
    "AMD Instinct MI300X": "mi300x",
}


@pytest.mark.parametrize(("device_name", "short"), NAMES.items())
def test_device_names_are_found(device_name: str, short: str) -> None:
    hardware = find_hardware(device_name)
    assert hardware is not None and hardware.name == short


def test_short_names_are_found_whatever_their_case() -> None:
    for hardware in known_hardware():
        assert find_hardware(hardware.name.upper()) is hardware


@pytest.mark.parametrize("name", ["", "AMD EPYC", "NVIDIA Z9000", "GeForce GTX 1080", "xh100x"])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert find_hardware(name) is None


def test_published_peaks() -> None:
    for name, peak in {"a800": 312, "h100": 989.4, "mi250x": 191.5, "v100": None}.items():
        hardware = find_hardware(name)
        assert hardware is not None and hardware.peak_tflops("bf16") == peak
