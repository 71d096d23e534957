"""Marks the parts of the model for the profiler, and profiles steps by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import profile, record_function, supported_activities

from flm_megatron.benchmarking.steps import Step
from flm_megatron.benchmarking.timeline import COMMUNICATION, GRADIENT_SUMS, IDLE, OTHER, PREFIX, STEP, seconds_by_part
from flm_megatron.training.step import OPTIMIZER, Batch

P = ParamSpec("P")
R = TypeVar("R")

HEAD = "head and loss"
PARTS = {
    "embedding": "embedding",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "final_layernorm": "norms",
    "self_attention": "attention",
    "mlp": "MLP",
}
"""Part of each module, by the last word of its name."""
ORDER = ("attention", "MLP", "norms", "embedding", HEAD, OPTIMIZER, GRADIENT_SUMS, COMMUNICATION, OTHER, IDLE)
"""Parts in the order they are shown. `other` is residual sums and the engine's own arithmetic."""


def profile_parts(chunks: Sequence[torch.nn.Module], step: Step, batches: list[Batch], steps: int) -> dict[str, float]:
    """Seconds of each part in one step of this process, the mean over `steps` profiled ones.

    `chunks` are the model chunks that `step` trains. Profiling slows a step, the more the smaller its operators.
    """
    with mark(chunks), profile(activities=supported_activities()) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step(batches)
    times = seconds_by_part(profiler.events())
    return {part: times.get(part, 0.0) / steps for part in ORDER}


@contextmanager
def mark(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """During the block the profiler sees the parts of the model and the waiting for other processes."""
    with ExitStack() as stack:
        for chunk in chunks:
            for name, module in chunk.named_modules():
                last = name.rsplit(".", 1)[-1]
                if last in PARTS:
                    _surround(module, PARTS[last], stack)
                if last == "decoder" and getattr(module, "post_process", False):
                    _surround_head(module, chunk, stack)
        stack.enter_context(_marked_waiting())
        yield


def _surround(module: torch.nn.Module, part: str, stack: ExitStack) -> None:
    """A range around each forward call of `module`, until `stack` is closed."""
    ranges: list[record_function] = []
    stack.callback(module.register_forward_pre_hook(lambda *_: _enter(ranges, part)).remove)
    stack.callback(module.register_forward_hook(lambda *_: _leave(ranges)).remove)


def _surround_head(decoder: torch.nn.Module, chunk: torch.nn.Module, stack: ExitStack) -> None:
    """A range from the end of the layers to the end of the model: head and loss are not all modules."""
    ranges: list[record_function] = []
    stack.callback(decoder.register_forward_hook(lambda *_: _enter(ranges, HEAD)).remove)
    stack.callback(chunk.register_forward_hook(lambda *_: _leave(ranges)).remove)


def _enter(ranges: list[record_function], part: str) -> None:
    ranges.append(record_function(PREFIX + part))
    ranges[-1].__enter__()


def _leave(ranges: list[record_function]) -> None:
    ranges.pop().__exit__(None, None, None)


@contextmanager
def _marked_waiting() -> Iterator[None]:
    """A range around waiting for a collective: the operator that starts it returns at once."""
    from torch.distributed import Work

    wait = Work.wait
    Work.wait = _in_range(wait, COMMUNICATION)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = wait  # type: ignore[method-assign]


def _in_range(call: Callable[P, R], part: str) -> Callable[P, R]:
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        """`call` in a range of `part`."""
        with record_function(PREFIX + part):
            return call(*args, **kwargs)

    return marked
