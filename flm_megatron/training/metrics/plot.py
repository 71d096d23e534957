"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`; a torn last line is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = []
    for line in lines:
        try:
            values.append(parse_json(line, "metrics.jsonl"))
        except RequestError:
            continue
    return [value for value in values if isinstance(value, dict)]


def plot_loss(folder: Path, baseline: tuple[str, float] | None = None) -> Path:
    """Draw training and validation loss against tokens and against training FLOPs into `loss.png`.

    Growths are marked, each with what its certificate measured. `baseline` is a labelled loss in nats to draw across,
    such as the unigram entropy. Returns the picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(folder)
    flops = cumulative_flops(lines)
    figure, panels = pyplot.subplots(1, 2, figsize=(14, 5), sharey=True, layout="constrained")
    for axes, label, places in (
        (panels[0], "tokens", [line["tokens"] for line in lines]),
        (panels[1], "training FLOPs", flops),
    ):
        _draw(axes, lines, places, baseline)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="loss, nats per token")
    panels[0].legend()
    figure.suptitle(folder.name)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def cumulative_flops(lines: list[dict[str, Any]]) -> list[float]:
    """Model FLOPs that the run has spent up to each line."""
    total, tokens, spent = 0.0, 0, []
    for line in lines:
        if "loss" in line:
            per_token = line["tflops_per_device"] * 1e12 / line["tokens_per_s_per_device"]
            total += (line["tokens"] - tokens) * per_token
            tokens = line["tokens"]
        spent.append(total)
    return spent


def _draw(axes: Any, lines: list[dict[str, Any]], places: list[float], baseline: tuple[str, float] | None) -> None:
    """One panel: every stage's training loss, the validation loss, and the growths."""
    for stage in dict.fromkeys(line["stage"] for line in lines):
        part = [(x, line["loss"]) for x, line in zip(places, lines, strict=True) if _is(line, "loss", stage)]
        axes.plot(*zip(*part, strict=True), linewidth=1, label=f"{stage}, training")
    validation = [(x, line["val_loss"]) for x, line in zip(places, lines, strict=True) if "val_loss" in line]
    if validation:
        axes.plot(*zip(*validation, strict=True), "ko-", ms=3, label="validation")
    if baseline:
        axes.axhline(baseline[1], color="tab:red", linestyle="--", linewidth=1, label=baseline[0])
    growths = [(x, line) for x, line in zip(places, lines, strict=True) if "certificate" in line]
    for number, (x, line) in enumerate(growths):
        height = 0.98 - 0.14 * number  # one below the other: on the axis of FLOPs early growths lie side by side
        axes.axvline(x, color="grey", linestyle=":")
        axes.annotate(_growth_text(line), (x, height), xycoords=("data", "axes fraction"), va="top", fontsize=8)


def _is(line: dict[str, Any], kind: str, stage: str) -> bool:
    return kind in line and line["stage"] == stage


def _growth_text(line: dict[str, Any]) -> str:
    certificate = line["certificate"]
    if not certificate:
        return f" grown into {line['stage']}"
    last = certificate["comparisons"][-1]
    return f" grown into {line['stage']}\n loss before {last['loss_before']:.6f}\n loss after  {last['loss_after']:.6f}"
