"""Results as Markdown, as JSON and as a plot of the parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flm_megatron.benchmarking.flops import NOTE
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.config.schema import StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import json_document
from flm_megatron.training.metrics.log import short

MEMORY_NOTE = (
    "Memory is the largest that one process held for the model: on a GPU tensors, on a CPU the growth of the process, "
    "which also has the allocator's and the threads' own. Planned is what the planner says of tensors."
)
PARTS_NOTE = (
    "Seconds of a profiled step, the mean over processes; profiling slows a step. On a CPU communication includes "
    "waiting for other processes (the pipeline's bubble too), and idle is the time in which no operator runs: Python, "
    "and other programs on the machine. On a GPU communication is what computation does not hide, and idle the time "
    "without a kernel. Recomputed operators count to their part."
)


@dataclass(frozen=True)
class Report:
    """What is written. `ratios` are the peers' step times in ours, `notes` what was left out and why."""

    title: str
    stage: StageConfig
    sequence_length: int
    parameters: int
    environment: Mapping[str, str]
    measurements: Sequence[Measurement]
    ratios: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The whole report."""
        return "\n\n".join(filter(None, self._sections())) + "\n"

    def _sections(self) -> Iterable[str]:
        yield f"# {self.title}"
        yield _bullets({**self.environment, "model": self._model()})
        yield _table(_speed_rows(self.measurements))
        if self.ratios:
            yield _table([["program", "its step / ours, median of pairs"], *_ratio_rows(self.ratios)])
        steps = len(self.measurements[0].step_times_s)
        yield f"Medians of {steps} steps; ± is half the distance between the quartiles. {NOTE} {MEMORY_NOTE}"
        if any(found.parts_s for found in self.measurements):
            yield "## Where a step goes"
            yield _table(_part_rows([found for found in self.measurements if found.parts_s]))
            yield PARTS_NOTE
        yield "\n".join(f"- {note}" for note in self.notes)

    def _model(self) -> str:
        model, stage = self.stage.model, self.stage
        fp8 = "" if stage.fp8 == "none" else f" with {stage.fp8} FP8 products in the layers of flm_megatron"
        return (
            f"{short(self.parameters)} parameters: {model.num_layers} layers, hidden {model.hidden_size}, feed-forward "
            f"{model.ffn_hidden_size}, {model.num_attention_heads} heads, vocabulary {model.vocab_size}; sequence "
            f"{self.sequence_length}, global batch {stage.global_batch}, micro-batch {stage.micro_batch}, "
            f"{stage.precision}{fp8}, recompute {stage.recompute}"
        )

    def json(self) -> str:
        """Everything as JSON, every step's time included."""
        return json_document(
            {
                "title": self.title,
                "environment": dict(self.environment),
                "model": self._model(),
                "parameters": self.parameters,
                "flops_convention": NOTE,
                "measurements": [found.to_json() for found in self.measurements],
                "ratios": dict(self.ratios),
                "notes": list(self.notes),
            }
        )

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.md, `name`.json and, where steps were divided into parts, `name`.svg; returns their paths.

        Raises:
            RequestError: the folder cannot be written to.
        """
        paths = [folder / f"{name}.md", folder / f"{name}.json"]
        text = self.markdown()
        divided = [found for found in self.measurements if found.parts_s]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if divided:
                paths.append(plot_parts(divided, folder / f"{name}.svg"))
                text += f"\n![Where a step goes]({name}.svg)\n"
            paths[0].write_text(text, encoding="utf-8")
            paths[1].write_text(self.json() + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write results to {folder}: {error.strerror}; give another --out") from None
        return paths


def _speed_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """A row for each measurement; where one process was measured too, with the share of as many times its speed."""
    head = ["program", "layout", "step, s", "±", "tokens/s", "TFLOP/s/device", "MFU", "HFU", "GiB", "planned GiB"]
    rows = [head, *(_speed(found) for found in measurements)]
    one = next((found for found in measurements if found.processes == 1), None)
    if one is not None and any(found.processes > 1 for found in measurements):
        head.append("of N x one process")
        for row, found in zip(rows[1:], measurements, strict=True):
            row.append(_percent(found.tokens_per_s / one.tokens_per_s / found.processes))
    return rows


def _speed(found: Measurement) -> list[str]:
    planned = "-" if found.planned_gib is None else f"{found.planned_gib:.3g}"
    return [
        found.program,
        found.layout,
        f"{found.step_time_s:.4g}",
        f"{100 * found.spread:.1f} %",
        f"{found.tokens_per_s:,.0f}",
        f"{found.tflops:.3g}",
        _percent(found.mfu),
        _percent(found.hfu),
        f"{found.memory_gib:.3g}",
        planned,
    ]


def _ratio_rows(ratios: Mapping[str, float]) -> list[list[str]]:
    return [[name, f"{ratio:.2f}"] for name, ratio in ratios.items()]


def _part_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """A row for each part; a column of seconds and one of shares for each measurement."""
    head = ["part"]
    for found in measurements:
        head += [f"{found.layout}, s", "share"]
    rows = [head]
    for part in measurements[0].parts_s:
        row = [part]
        for found in measurements:
            row += [f"{found.parts_s[part]:.4g}", _percent(found.parts_s[part] / sum(found.parts_s.values()))]
        rows.append(row)
    return rows


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def _bullets(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def plot_parts(measurements: Sequence[Measurement], path: Path) -> Path:
    """Draw one stacked bar of seconds by part for each measurement; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.5 * len(measurements)), layout="constrained")
    labels = [found.layout for found in measurements]
    left = [0.0] * len(measurements)
    for part in measurements[0].parts_s:
        widths = [found.parts_s[part] for found in measurements]
        axes.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a profiled step")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    return path
