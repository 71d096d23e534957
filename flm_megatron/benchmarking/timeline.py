"""Seconds of a profiled step by part of the model, from torch's profiler.

A forward pass is divided by ranges that `parts.mark` opens around modules. An operator of the backward pass belongs
to the part whose forward operator it differentiates: both carry the same thread and sequence number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from flm_megatron.training.step import OPTIMIZER

PREFIX = "part: "
"""Begins the name of every range that names a part."""
STEP = "benchmark step"
"""Name of the range around a step."""
COMMUNICATION, IDLE, OTHER, GRADIENT_SUMS = "communication", "idle", "other", "gradient sums"
BACKWARD = "autograd::engine::evaluate_function: "
ACCUMULATION = f"{BACKWARD}torch::autograd::AccumulateGrad"
COLLECTIVES = ("c10d::", "gloo:", "nccl")


def seconds_by_part(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Seconds of each part in all profiled steps of this process; they add up to the time of the steps.

    On a CPU a part has the time of its operators on the thread that trains; `communication` is waiting for
    collectives and other processes, `idle` the time in which that thread runs no operator. On a GPU a part has the
    time of its kernels, `communication` is what no computation hides, `idle` the time without any kernel.
    """
    events = list(events)
    host = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    device = [event for event in events if event.device_type != DeviceType.CPU and not _is_range(event.name)]
    steps = [event for event in host if event.name == STEP]
    parts = _Parts(host)
    wall = sum(event.time_range.elapsed_us() for event in steps)
    if device:
        return _in_seconds(_device_times(host, device, parts, wall))
    return _in_seconds(_host_times(host, steps, parts, wall))


class _Parts:
    """Finds the part of a host event: of the nearest range or backward node around it."""

    def __init__(self, host: list[FunctionEvent]) -> None:
        self._forward: dict[tuple[int | None, int], str] = {}
        self._known: dict[int, str] = {}
        for event in sorted(host, key=lambda event: event.time_range.start):
            part = self.of(event)
            if event.sequence_nr >= 0 and not self._in_backward(event):
                # The last operator with this number is the one that made the node.
                self._forward[event.thread, event.sequence_nr] = part

    def of(self, event: FunctionEvent) -> str:
        """Part of `event`; parents come before their children."""
        found = self._known.get(id(event))
        if found is None:
            found = self._known[id(event)] = self._find(event)
        return found

    def _find(self, event: FunctionEvent) -> str:
        if event.name.startswith(COLLECTIVES):
            return COMMUNICATION
        if event.name == OPTIMIZER or event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(ACCUMULATION):
            return GRADIENT_SUMS
        if event.name.startswith(BACKWARD):
            return self._forward.get((event.fwd_thread, event.sequence_nr), OTHER)
        return self.of(event.cpu_parent) if event.cpu_parent is not None else OTHER

    def _in_backward(self, event: FunctionEvent | None) -> bool:
        """Whether the nearest range or node around `event` is a backward node: what is recomputed is not."""
        while event is not None and not event.name.startswith(PREFIX):
            if event.name.startswith(BACKWARD):
                return True
            event = event.cpu_parent
        return False


def _host_times(host: list[FunctionEvent], steps: list[FunctionEvent], parts: _Parts, wall: float) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    threads = {event.thread for event in steps}
    for event in host:
        inside = any(s.time_range.start <= event.time_range.start < s.time_range.end for s in steps)
        if event.thread in threads and inside and event.name != STEP:
            part = parts.of(event)
            if not _is_range(event.name) or part == COMMUNICATION:
                times[part] += event.self_cpu_time_total
    times[IDLE] = max(0.0, wall - sum(times.values()))
    return times


def _device_times(
    host: list[FunctionEvent], device: list[FunctionEvent], parts: _Parts, wall: float
) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for event in host:
        for kernel in event.kernels:
            if not kernel.name.startswith(COLLECTIVES) and not _is_range(kernel.name):
                times[parts.of(event)] += kernel.duration
    collectives = [event for event in device if event.name.startswith(COLLECTIVES)]
    others = [event for event in device if not event.name.startswith(COLLECTIVES)]
    busy, all_busy = _covered(_spans(others)), _covered(_spans(collectives + others))
    times[COMMUNICATION] = all_busy - busy
    times[IDLE] = max(0.0, wall - all_busy)
    return times


def _spans(events: list[FunctionEvent]) -> list[tuple[float, float]]:
    return [(event.time_range.start, event.time_range.end) for event in events]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _is_range(name: str) -> bool:
    return name in (STEP, OPTIMIZER) or name.startswith(PREFIX)


def _in_seconds(times: Mapping[str, float]) -> dict[str, float]:
    return {part: microseconds / 1e6 for part, microseconds in times.items()}
