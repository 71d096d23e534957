"""The lines of a run's `metrics.jsonl`: a class for each kind, written and read here alone.

A line is a JSON object. All kinds say where the run stood (`stage`, `step`, `tokens`), and each is known by a key of
its own (`KEY`). Kinds that are not known, which a hook of the user or a later version may have written, are kept as
they are. No torch here: the planner reads these files too.
"""

from flm_megatron.training.metrics.events.changes import ChangeEvent, GrowthEvent, RestartEvent
from flm_megatron.training.metrics.events.event import MetricsEvent, Values
from flm_megatron.training.metrics.events.lines import (
    FILE,
    KINDS,
    Line,
    OtherEvent,
    line_of,
    line_text,
    of_kind,
    parse_line,
    read_events,
    read_lines,
)
from flm_megatron.training.metrics.events.measures import SET, EvaluationEvent, GrowthHealthEvent, ValidationEvent
from flm_megatron.training.metrics.events.steps import (
    MASK,
    STEP_NUMBERS,
    NewLevelEvent,
    RefusedEvent,
    SaveEvent,
    StepEvent,
)

__all__ = [
    "FILE",
    "KINDS",
    "MASK",
    "SET",
    "STEP_NUMBERS",
    "ChangeEvent",
    "EvaluationEvent",
    "GrowthEvent",
    "GrowthHealthEvent",
    "Line",
    "MetricsEvent",
    "NewLevelEvent",
    "OtherEvent",
    "RefusedEvent",
    "RestartEvent",
    "SaveEvent",
    "StepEvent",
    "ValidationEvent",
    "Values",
    "line_of",
    "line_text",
    "of_kind",
    "parse_line",
    "read_events",
    "read_lines",
]
