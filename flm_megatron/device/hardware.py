"""What accelerators can do: dense peak rates, memory and memory bandwidth, from their makers' data sheets.

Rates are without sparsity, with fp32 accumulation, for one device as torch counts them (an MI250X card is two).
No torch here: planning for hardware that is elsewhere starts from this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator.

    Peaks are in TFLOP/s; none means that the device has no units for that format. `fp32` is the plain (non-TF32)
    rate. `memory_gib` is about what the driver offers to programs, `bandwidth_gb_per_s` (1e9 bytes) the data
    sheet's; `fp16` is none where it is bf16's rate. `pattern` is a regular expression that torch's name of the device
    contains.
    """

    name: str
    pattern: str
    bf16: float | None
    fp32: float
    fp8: float | None
    memory_gib: float
    bandwidth_gb_per_s: float
    fp16: float | None = None

    def peak_tflops(self, precision: Precision) -> float | None:
        """Dense peak of matrix multiplications in `precision`, in TFLOP/s; none if there are no units for it."""
        half = self.bf16 if self.fp16 is None else self.fp16
        return {"fp32": self.fp32, "bf16": self.bf16, "fp16": half, "fp8": self.fp8}[precision]


# The first row whose pattern is found wins, so the narrower patterns of a family come first.
TABLE = (
    Hardware("v100-16gb", r"V100.*16GB", None, 15.7, None, 15.8, 900, 125),
    Hardware("v100", r"V100", None, 15.7, None, 31.7, 900, 125),
    Hardware("a100-40gb", r"A100.*40GB", 312, 19.5, None, 39.4, 1555),
    Hardware("a100-pcie", r"A100.*PCIE", 312, 19.5, None, 79.2, 1935),
    Hardware("a100", r"A100", 312, 19.5, None, 79.2, 2039),
    Hardware("a800", r"A800", 312, 19.5, None, 79.2, 2039),
    Hardware("a40", r"A40\b", 149.7, 37.4, None, 44.4, 696),
    Hardware("a10", r"A10\b", 125, 31.2, None, 22.1, 600),
    Hardware("gh200", r"GH200", 989.4, 66.9, 1978.9, 94.5, 4000),
    Hardware("h100-pcie", r"H100.*PCIe", 756, 51.2, 1513, 79.1, 2039),
    Hardware("h100-nvl", r"H100.*NVL", 835, 60, 1671, 93.1, 3938),
    Hardware("h100", r"H100", 989.4, 66.9, 1978.9, 79.1, 3352),
    Hardware("h800-pcie", r"H800.*PCIe", 756, 51.2, 1513, 79.1, 2039),
    Hardware("h800", r"H800", 989.4, 66.9, 1978.9, 79.1, 3352),
    Hardware("h200", r"H200", 989.4, 66.9, 1978.9, 139.8, 4800),
    Hardware("h20", r"H20\b", 148, 44, 296, 95.1, 4000),
    Hardware("gb200", r"GB200", 2500, 80, 5000, 184, 8000),
    Hardware("b200", r"B200", 2250, 75, 4500, 178, 7700),
    Hardware("l40s", r"L40S", 362, 91.6, 733, 44.4, 864),
    Hardware("l40", r"L40\b", 181, 90.5, 362, 44.4, 864),
    Hardware("l4", r"L4\b", 121, 30.3, 242, 22.2, 300),
    Hardware("rtx-3090", r"RTX 3090", 71, 35.6, None, 23.6, 936),
    Hardware("rtx-4090", r"RTX 4090", 165.2, 82.6, 330.3, 23.6, 1008),
    Hardware("rtx-5090", r"RTX 5090", 209.5, 104.8, 419, 31.4, 1792),
    Hardware("mi250x", r"MI250X", 191.5, 23.95, None, 64, 1638),
    Hardware("mi300x", r"MI300X", 1307.4, 163.4, 2614.9, 192, 5300),
    Hardware("mi325x", r"MI325X", 1307.4, 163.4, 2614.9, 256, 6000),
)


def known_hardware() -> tuple[Hardware, ...]:
    """All accelerators of the table."""
    return TABLE


def find_hardware(name: str) -> Hardware | None:
    """Accelerator of that short name (`h100`, `a100-40gb`) or device name (`NVIDIA H100 80GB HBM3`); none if unknown.

    An unknown device has no peak to compare with, so its MFU is shown as n/a rather than guessed.
    """
    short = re.sub(r"[\s_]+", "-", name.strip().lower())
    for hardware in TABLE:
        if hardware.name == short:
            return hardware
    for hardware in TABLE:
        if re.search(rf"(?<![A-Za-z0-9]){hardware.pattern}(?![0-9])", name, re.IGNORECASE):
            return hardware
    return None
