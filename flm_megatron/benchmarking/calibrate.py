"""Times products, attention and copies on this device, and writes the planner's efficiencies.

An accelerator of the data-sheet table gets the fractions of its data sheet that it reaches. For any other device, such
as a CPU, the largest measured rates replace the data sheet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.nn.functional as F

from flm_megatron.benchmarking.environment import command_line, environment
from flm_megatron.device import current
from flm_megatron.device.hardware import Hardware, find_hardware
from flm_megatron.errors import RequestError
from flm_megatron.planner.calibration import TimedProduct, fit_products, write_efficiency
from flm_megatron.planner.cost.compute import FLASH_BACKWARD
from flm_megatron.planner.cost.matmul import peak_flops
from flm_megatron.planner.layout import CPU
from flm_megatron.planner.machine import Machine, find_machine

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASE = "h100"
"""The machine that supplies an unknown device's links, power and price, which are not measured."""


@dataclass(frozen=True)
class Effort:
    """How large the measured things get: sizes double from `smallest` until one call takes `longest_s`."""

    smallest: int = 256
    largest: int = 16384
    longest_s: float = 0.2
    copied_bytes: int = 2**28
    repeats: int = 5


def calibrate(path: Path, effort: Effort | None = None) -> str:
    """Measure this device, write a hardware file for `flm plan --hardware` to `path`; returns what was found.

    Raises:
        RequestError: the file cannot be written.
    """
    effort = effort or Effort()
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {path.parent}")
    known = find_hardware(current().hardware_name())
    precision: Precision = "fp32" if known is None or known.bf16 is None else "bf16"
    timed = list(time_products(precision, effort))
    bandwidth = copy_bandwidth(effort)
    machine = find_machine(known.name) if known else _unknown_machine(timed, bandwidth, effort)
    shares = _shares(machine, precision, timed, bandwidth, effort)
    note = _note(precision, timed, bandwidth, known)
    try:
        write_efficiency(path, note, fields=None if known else _fields(machine), **shares)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None
    found = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
    use = f"flm plan RUN.yaml --gpu {machine.name if known else BASE} --hardware {path} --gpus N"
    return f"{note}\nefficiencies: {found}\nwritten: {path}; use it with {use}"


def _shares(
    machine: Machine, precision: Precision, timed: list[TimedProduct], bandwidth: float, effort: Effort
) -> dict[str, float]:
    """The planner's efficiencies; copies first, for they bound small products."""
    memory = min(1.0, bandwidth / (machine.hardware.bandwidth_gb_per_s * 1e9))
    machine = replace(machine, efficiency=replace(machine.efficiency, memory=memory))
    matmul, overhead = fit_products(machine, precision, timed)
    attention = min(1.0, attention_flops_per_s(precision, effort) / peak_flops(machine, precision))
    return {"matmul": matmul, "tile_overhead": overhead, "attention": attention, "memory": memory}


def time_products(precision: Precision, effort: Effort) -> Iterator[TimedProduct]:
    """Square, wide, deep and uneven products of growing size."""
    for size in _sizes(effort):
        shapes = [(size, size, size), (size, 4 * size, size), (size, size, 4 * size), (size, 3 * size - 64, size)]
        products = [_time_product(*shape, precision, effort.repeats) for shape in shapes]
        yield from products
        if max(product.seconds for product in products) > effort.longest_s:
            return


def _sizes(effort: Effort) -> Iterator[int]:
    doubled = (effort.smallest * 2**power for power in range(32))
    return takewhile(lambda size: size <= effort.largest, doubled)


def _time_product(rows: int, columns: int, inner: int, precision: Precision, repeats: int) -> TimedProduct:
    dtype, device = DTYPES[precision], current().torch_device
    left, right, out = (
        torch.randn(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns), (rows, columns))
    )
    return TimedProduct(rows, columns, inner, seconds(lambda: torch.mm(left, right, out=out), repeats))


def attention_flops_per_s(precision: Precision, effort: Effort) -> float:
    """Causal attention, forward and backward, over the keys that causality leaves: the largest size's rate."""
    best, batch, heads, channels = 0.0, 1, 8, 128
    for sequence in _sizes(effort):
        shape = (batch, heads, sequence, channels)
        query, key, value = (
            torch.randn(shape, dtype=DTYPES[precision], device=current().torch_device, requires_grad=True)
            for _ in range(3)
        )

        def both(query: torch.Tensor = query, key: torch.Tensor = key, value: torch.Tensor = value) -> None:
            """One forward and backward pass."""
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(output, (query, key, value), output.detach())

        taken = seconds(both, effort.repeats)
        flops = 2 * 2 * batch * heads * sequence * (sequence / 2) * channels
        best = max(best, flops * (1 + FLASH_BACKWARD) / taken)
        if taken > effort.longest_s:
            break
    return best


def copy_bandwidth(effort: Effort) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.empty(effort.copied_bytes, dtype=torch.uint8, device=current().torch_device).fill_(1)
    target = torch.empty_like(source)
    return 2 * effort.copied_bytes / seconds(lambda: target.copy_(source), effort.repeats)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that does not count; short calls are timed several at once."""
    device = current()

    def timed(calls: int) -> float:
        """Mean time of a number of calls."""
        device.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        device.synchronize()
        return (time.perf_counter() - began) / calls

    timed(1)
    calls = max(1, min(100, int(1e-2 / timed(1))))
    return statistics.median(timed(calls) for _ in range(repeats))


def _unknown_machine(timed: list[TimedProduct], bandwidth: float, effort: Effort) -> Machine:
    """A machine of this device's measured rates: one unit that works on one tile at a time."""
    size = effort.smallest
    bf16 = _time_product(size, size, size, "bf16", effort.repeats)
    base = find_machine(BASE)
    hardware = Hardware(
        name=current().hardware_name(),
        pattern="",
        bf16=_tflops(bf16),
        fp32=max(_tflops(product) for product in timed),
        fp8=None,
        memory_gib=psutil.virtual_memory().total / 2**30,
        bandwidth_gb_per_s=bandwidth / 1e9,
    )
    return replace(base, hardware=hardware, multiprocessors=1, software=CPU)


def _tflops(product: TimedProduct) -> float:
    return 2.0 * product.rows * product.columns * product.inner / product.seconds / 1e12


def _fields(machine: Machine) -> dict[str, object]:
    """The fields in the file of a device that is not in the table."""
    hardware = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(machine.hardware).items()
        if name not in ("pattern", "fp8", "fp16")
    }
    return {
        "hardware": hardware,
        "multiprocessors": machine.multiprocessors,
        "software": asdict(machine.software),
    }


def _note(precision: Precision, timed: list[TimedProduct], bandwidth: float, known: Hardware | None) -> str:
    here = environment(command_line())
    best = max(timed, key=_tflops)
    lines = [f"{name}: {here[name]}" for name in ("hardware", "commit", "versions", "command", "date")]
    lines.append(
        f"measured: {_tflops(best):.4g} TFLOP/s at best in {precision} ({best.rows} x {best.inner} x {best.columns}), "
        f"copies at {bandwidth / 1e9:.4g} GB/s read and written"
    )
    if known is None:
        lines.append(
            f"The device is not in the data-sheet table: its peaks are the measured ones, and whatever is not in this "
            f"file, such as power and price, is that of {BASE}."
        )
    lines.append("not measured: links between devices (intra, inter)")
    return "\n".join(lines)
