"""Points and events for trackers out of the lines of `metrics.jsonl`, on one axis of steps over all stages."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import singledispatchmethod
from pathlib import Path
from typing import BinaryIO, TypeGuard

from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.json_text import Json, JsonObject
from flm_megatron.model.parameters import parameter_count
from flm_megatron.training.metrics.events import (
    ChangeEvent,
    EvaluationEvent,
    GrowthEvent,
    GrowthHealthEvent,
    Line,
    MetricsEvent,
    NewLevelEvent,
    OtherEvent,
    RefusedEvent,
    RestartEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
)
from flm_megatron.training.metrics.events.event import PLACE
from flm_megatron.training.trackers.tracker import Event, Point

CHUNK = 2**20
"""Bytes that are read at a time: what is sent at once stays small."""
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


class Tail:
    """Reads what is new in a file of lines, from its beginning again when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> tuple[bool, list[str]]:
        """Whether this is the file's beginning, and whole lines that were not read yet, about `CHUNK` bytes of them."""
        replaced = self._reopened()
        if self._file is None:
            return False, []
        *whole, self._rest = (self._rest + self._file.read(CHUNK)).split(b"\n")
        return replaced, [row.decode("utf-8", "replace") for row in whole]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopened(self) -> bool:
        """Open the file if it is there and another one than before; returns whether it was."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        if self._file is not None:
            held = os.fstat(self._file.fileno())
            if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino) and now.st_size >= self._file.tell():
                return False
            self.close()
        self._file, self._rest = self.path.open("rb"), b""
        return True


class Reading:
    """One reading of a run's metrics from their beginning: the steps of earlier stages are added to those of a line."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.models = {stage.name: stage.model for stage in run.stages}
        self.names = [*self.models]
        self.stage, self.before, self.done = "", 0, 0
        self.sizes: JsonObject = {}

    def items(self, line: Line) -> Iterator[Point | Event]:
        """What a line holds; nothing for one that cannot be placed. A stage begins with an event."""
        if line.stage not in self.models or line.step is None:
            return
        if line.stage != self.stage:
            self.stage, self.before, self.done = line.stage, self.before + self.done, 0
            self.sizes = _sizes(self.models[line.stage])
            yield self._event("stage", line, f"stage {line.stage}: {_in_words(self.sizes)}", self.sizes)
        self.done = max(self.done, line.step)
        yield from self._items(line)

    def _step(self, line: Line) -> int:
        return self.before + (line.step or 0)

    def _point(self, line: Line, values: Mapping[str, object]) -> Point:
        """The finite numbers among the values, with the place of the line; no name is a folder of others, which some
        trackers cannot store."""
        place: dict[str, object] = {"stage": self.names.index(self.stage), "stage_step": line.step}
        place["tokens"] = _tokens(line)
        numbers = {_name(name): float(value) for name, value in (dict(values) | place).items() if _is_finite(value)}
        folders = {name[:at] for name in numbers for at, letter in enumerate(name) if letter == "/"}
        apart = {f"{name}.all" if name in folders else name: value for name, value in numbers.items()}
        return Point(self._step(line), apart)

    def _event(self, what: str, line: Line, text: str, details: JsonObject) -> Event:
        return Event(what, self.stage, self._step(line), _tokens(line), text, details)

    @singledispatchmethod
    def _items(self, line: Line) -> Iterator[Point | Event]:
        """Points and events of a line; of a kind that is not known, the numbers in it."""
        if isinstance(line, OtherEvent) and not line.problem:
            values = {name: value for name, value in line.values.items() if name not in PLACE}
            yield self._point(line, dict(_numbers(values)))

    @_items.register
    def _(self, line: StepEvent) -> Iterator[Point | Event]:
        """A step's own numbers, and what hooks measured with it."""
        parameters = {"model/parameters": self.sizes["parameters"]}
        train = {f"train/{name}": value for name, value in (line.own_values() | dict(line.extra)).items()}
        yield self._point(line, train | parameters)

    @_items.register
    def _(self, line: ValidationEvent) -> Iterator[Point | Event]:
        """The mean loss, and that of each set."""
        sets = {f"validation/sets/{name}": loss for name, loss in line.by_set.items()}
        yield self._point(line, {"validation/loss": line.loss} | sets)

    @_items.register
    def _(self, line: EvaluationEvent) -> Iterator[Point | Event]:
        """What was measured, and what the model wrote."""
        yield self._point(line, {f"evaluation/{name}": value for name, value in line.values.items()})
        if line.completions:
            texts: JsonObject = {"completions": [list(pair) for pair in line.completions]}
            prompt, text = line.completions[0]
            yield self._event("completions", line, f"{prompt}{text}", texts)

    @_items.register
    def _(self, line: GrowthHealthEvent) -> Iterator[Point | Event]:
        """All numbers of all parts."""
        yield self._point(line, dict(_numbers({"growth_health": line.parts})))

    @_items.register
    def _(self, line: GrowthEvent) -> Iterator[Point | Event]:
        """Sizes before and after, and the certificate."""
        source = self.names[max(0, self.names.index(self.stage) - 1)]
        before, certificate = _sizes(self.models[source]), line.certificate
        details: JsonObject = {"before": before, "after": self.sizes}
        text = f"{line.change} into {self.stage}: from {_in_words(before)} to {_in_words(self.sizes)}"
        if certificate:
            last = certificate.comparisons[-1]
            measured = {"loss_before": last.loss_before, "loss_after": last.loss_after}
            measured["rms_difference"] = last.rms_difference / last.logit_std
            measured["max_difference"] = last.max_difference / last.logit_std
            yield self._point(line, {f"growth/{name}": value for name, value in measured.items()})
            details["certificate"] = certificate.to_json()
            text += f"; loss {last.loss_before:.6f} before, {last.loss_after:.6f} after"
        yield self._event(line.change, line, text, details)

    @_items.register
    def _(self, line: RefusedEvent) -> Iterator[Point | Event]:
        """Why the step was refused."""
        details = {"policy": line.policy, "samples": list(line.samples)}
        yield self._event("refused", line, f"{line.stage} step {line.step} refused: {line.reason}", details)

    @_items.register
    def _(self, line: RestartEvent) -> Iterator[Point | Event]:
        """Where the run went on."""
        yield self._event("restart", line, f"{line.stage} goes on from step {line.step}", {})

    @_items.register
    def _(self, line: ChangeEvent) -> Iterator[Point | Event]:
        """The setting, before and now."""
        text = f"{line.what} was {line.before}, is {line.now}"
        yield self._event("change", line, text, {"setting": line.what, "before": line.before, "now": line.now})

    @_items.register
    def _(self, line: NewLevelEvent) -> Iterator[Point | Event]:
        """The message of the spike guard."""
        yield self._event("new_level", line, line.level, {})

    @_items.register
    def _(self, line: SaveEvent) -> Iterator[Point | Event]:
        """The checkpoint's path."""
        yield self._event("save", line, line.path, {})


def kind_of(line: Line) -> str:
    """What lines of one kind, of which a step has one at most, have in common."""
    if isinstance(line, MetricsEvent):
        return line.KEY
    return ",".join(sorted(name for name in line.values if name not in PLACE))[:200]


def _tokens(line: Line) -> int:
    tokens = line.tokens if isinstance(line, MetricsEvent) else line.values.get("tokens")
    return tokens if isinstance(tokens, int) else 0


def _numbers(value: Json, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number below a value, under the path to it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}/{name}" if path else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(text: str) -> str:
    """A name of letters that every tracker takes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in text)


def _sizes(model: ModelConfig) -> JsonObject:
    """How many parameters a model has, and its sizes."""
    return {"parameters": parameter_count(model)} | {name: getattr(model, name) for name in SIZES}


def _in_words(sizes: JsonObject) -> str:
    words = {"parameters": "parameters", "num_layers": "layers", "hidden_size": "hidden"}
    return ", ".join(f"{sizes[name]:,} {word}" for name, word in words.items())
