"""A simulated step as a Chrome trace, for https://ui.perfetto.dev and chrome://tracing.

A process is a pipeline rank, its threads are what it computes and waits for, and what runs beside that over the
tensor group, the pipeline and the data group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.planner.rehearsal.timing.step import SimulatedStep, pass_name
from flm_megatron.planner.simulation.events import Span
from flm_megatron.planner.simulation.schedule import Pass

THREADS = ("compute", "tensor", "pipeline", "data", "model")
MOST_EVENTS = 150_000
"""About 15 MB."""
MICROSECONDS = 1e6


def write_trace(step: SimulatedStep, path: Path) -> str:
    """Write the step to a file; of many micro-batches the time until the first few are through, and that from where
    the last few begin. Returns what of the step there is.

    Raises:
        RequestError: the file cannot be written.
    """
    at_ends = _micro_batches_at_ends(step)
    total = step.schedule.micro_batches
    shown = (
        f"all {total:,} micro-batches"
        if at_ends is None
        else f"the first and last {at_ends} of {total:,} micro-batches"
    )
    events = [*_names(step), *map(_event, _spans(step, at_ends))]
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"shown": shown}}
    try:
        path.write_text(json.dumps(content, separators=(",", ":")))
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None
    return shown


def _micro_batches_at_ends(step: SimulatedStep) -> int | None:
    """The most at either end that the file may hold; all (none) if it may."""
    if _count(step, None) <= MOST_EVENTS:
        return None
    few = step.schedule.micro_batches // 2
    while few > 1 and _count(step, few) > MOST_EVENTS:
        few //= 2
    return few


def _count(step: SimulatedStep, at_ends: int | None) -> int:
    """Events of a trace."""
    return sum(
        1 + (len(step.segment(span.rank, span.what).named_spans) if isinstance(span.what, Pass) else 0)
        for span in _outer_spans(step, at_ends)
    )


def _outer_spans(step: SimulatedStep, at_ends: int | None) -> Iterator[Span]:
    """What is shown, passes as a whole."""
    spans = step.simulation.spans
    if at_ends is None:
        return iter(spans)
    late = step.schedule.micro_batches - at_ends
    passes = [(span, span.what.micro_batch) for span in spans if isinstance(span.what, Pass)]
    first = max((span.end for span, number in passes if number < at_ends), default=0.0)
    last = min((span.begin for span, number in passes if number >= late), default=first)
    return (span for span in spans if span.end <= first or span.begin >= last)


def _spans(step: SimulatedStep, at_ends: int | None) -> Iterator[Span]:
    """What is shown, with what happens inside of passes: collectives of the tensor group, and waiting for them."""
    for span in _outer_spans(step, at_ends):
        yield span
        if isinstance(span.what, Pass):
            for inner in step.segment(span.rank, span.what).named_spans:
                yield Span(span.rank, inner.stream, inner.what, span.begin + inner.begin, span.begin + inner.end)


def _event(span: Span) -> dict[str, object]:
    waits = span.stream == "compute" and span.what in ("bubble", *THREADS)
    name = pass_name(span.what) if isinstance(span.what, Pass) else f"wait: {span.what}" if waits else span.what
    return {
        "name": name,
        "ph": "X",
        "ts": round(span.begin * MICROSECONDS, 1),
        "dur": round((span.end - span.begin) * MICROSECONDS, 1),
        "pid": span.rank,
        "tid": THREADS.index(span.stream),
    }


def _names(step: SimulatedStep) -> Iterator[dict[str, object]]:
    for rank in range(step.schedule.pipeline):
        yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for number, thread in enumerate(THREADS):
            yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": number, "args": {"name": thread}}
