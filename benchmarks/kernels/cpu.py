"""Processor time of each operation, forward and backward, against the same formula left to autograd, on one CPU core;
of some also through torch.compile (`kernels: {NAME: compile}`), compiling not counted.

    OMP_NUM_THREADS=1 python benchmarks/kernels/cpu.py

Prints a Markdown table: the least processor time of the repeats, which other load on the machine hardly changes, and
how far one call raises the resident memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig
from flm_megatron.device import current

REPEATS = 15
TOKENS, BATCH, HIDDEN, FFN, HEADS, VOCABULARY = 512, 4, 512, 1344, 8, 32000
Operation = Callable[..., Tensor]
COMPILE = KernelsConfig(rms_norm="compile", swiglu="compile", rotary="compile")


def cases(dtype: torch.dtype) -> dict[str, tuple[Operation, Operation, list[Tensor]]]:
    """Name, our operation, the plain one, and inputs."""
    rows, channels = TOKENS * BATCH, HIDDEN // HEADS
    angles = torch.outer(torch.arange(TOKENS), torch.rand(channels // 2))
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    ones = torch.ones(TOKENS)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    def plain_rotary(packed: Tensor) -> Tensor:
        query, key, value = (packed * 1).view(TOKENS, BATCH, HEADS, 3 * channels).split(channels, -1)
        whole = torch.cat([angles, angles], -1)[:, None, None, :]
        cos, sin = whole.cos().to(dtype), whole.sin().to(dtype)
        turned = [x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key)]
        return turned[0] + turned[1] + value

    def our_rotary(packed: Tensor) -> Tensor:
        query, key, value = kernels.rotary_qkv(packed * 1, angles.cos(), angles.sin(), 1)
        return query + key + value

    return {
        f"RMSNorm {rows} x {HIDDEN}": (
            lambda x, w: kernels.rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-5),
            [leaf(rows, HIDDEN), leaf(HIDDEN)],
        ),
        f"SwiGLU {rows} x {FFN}": (
            kernels.swiglu,
            lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            [leaf(rows, 2 * FFN)],
        ),
        f"rotary {TOKENS} x {BATCH} x {HEADS} heads": (our_rotary, plain_rotary, [leaf(TOKENS, BATCH, 3 * HIDDEN)]),
        f"cross entropy {TOKENS} x {VOCABULARY}": (
            lambda x: kernels.cross_entropy(x * 1, labels, overwrite=True),
            lambda x: F.cross_entropy((x * 1).float(), labels, reduction="none"),
            [leaf(TOKENS, VOCABULARY)],
        ),
        f"head and cross entropy {TOKENS} x {VOCABULARY}, chunks of 128": (
            lambda x, w: kernels.linear_cross_entropy(x, w, labels, ones, chunk_tokens=128)[0],
            lambda x, w: F.cross_entropy((x @ w.t()).float(), labels, reduction="sum"),
            [leaf(TOKENS, 64), leaf(VOCABULARY, 64)],
        ),
    }


def cost(operation: Operation, inputs: list[Tensor]) -> tuple[float, float]:
    """Least processor time in ms of forward and backward, and the rise of the resident memory in MiB."""
    device, times, rises = current(), [], []
    for _ in range(REPEATS):
        for x in inputs:
            x.grad = None
        device.reset_peak_memory()
        before, began = device.peak_memory_gib(), time.process_time()
        operation(*inputs).sum().backward()
        times.append(time.process_time() - began)
        rises.append(device.peak_memory_gib() - before)
    return min(times) * 1e3, max(rises) * 1024


def compiled_ms(operation: Operation, inputs: list[Tensor]) -> float:
    """Least processor time in ms of forward and backward with compiled operations."""
    kernels.use(kernels.choose(COMPILE))
    time_ms, _ = cost(operation, inputs)
    kernels.use(kernels.choose())
    return time_ms


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{current().hardware_name()}, one core, torch {torch.__version__}\n")
    print("| operation | dtype | ours, ms | plain, ms | plain / ours | ours, MiB | plain, MiB | compiled, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for name, (ours, plain, inputs) in cases(dtype).items():
            (our_ms, our_mib), (plain_ms, plain_mib) = cost(ours, inputs), cost(plain, inputs)
            numbers = f"{our_ms:.1f} | {plain_ms:.1f} | {plain_ms / our_ms:.2f} | {our_mib:.0f} | {plain_mib:.0f}"
            numbers += f" | {compiled_ms(ours, inputs):.1f}" if name.startswith(("RMS", "Swi", "rot")) else " |"
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
