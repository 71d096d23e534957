"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.growth.change import DONE
from flm_megatron.training.metrics.events import (
    GrowthEvent,
    MetricsEvent,
    StepEvent,
    ValidationEvent,
    read_events,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss(folder: Path, baseline: tuple[str, float] | None = None) -> Path:
    """Plot training and validation loss against tokens and against training FLOPs; writes `loss.png`.

    Growths are marked with what their certificates measured. `baseline` is a labelled loss in nats, such as the unigram
    entropy, drawn as a line. Returns the picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    events = read_events(folder, MetricsEvent)
    flops = cumulative_flops(events)
    figure, panels = pyplot.subplots(1, 2, figsize=(14, 5), sharey=True, layout="constrained")
    for axes, label, places in (
        (panels[0], "tokens", [event.tokens for event in events]),
        (panels[1], "training FLOPs", flops),
    ):
        _draw(axes, list(zip(places, events, strict=True)), baseline)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="loss, nats per token")
    panels[0].legend()
    figure.suptitle(folder.name)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def cumulative_flops(events: Sequence[MetricsEvent]) -> list[float]:
    """Model FLOPs that the run has spent up to each event."""
    total, tokens, spent = 0.0, 0, []
    for event in events:
        if isinstance(event, StepEvent):
            per_token = event.tflops_per_device * 1e12 / event.tokens_per_s_per_device
            total += (event.tokens - tokens) * per_token
            tokens = event.tokens
        spent.append(total)
    return spent


def _draw(axes: Axes, placed: list[tuple[float, MetricsEvent]], baseline: tuple[str, float] | None) -> None:
    """One panel: every stage's training loss, the validation loss, and the growths."""
    for stage in dict.fromkeys(event.stage for _, event in placed):
        part = [(x, event.loss) for x, event in placed if isinstance(event, StepEvent) and event.stage == stage]
        axes.plot(*zip(*part, strict=True), linewidth=1, label=f"{stage}, training")
    validation = [(x, event.loss) for x, event in placed if isinstance(event, ValidationEvent)]
    if validation:
        axes.plot(*zip(*validation, strict=True), "ko-", ms=3, label="validation")
    if baseline:
        axes.axhline(baseline[1], color="tab:red", linestyle="--", linewidth=1, label=baseline[0])
    growths = [(x, event) for x, event in placed if isinstance(event, GrowthEvent)]
    for number, (x, event) in enumerate(growths):
        height = 0.98 - 0.14 * number  # one below the other: on the axis of FLOPs early growths lie side by side
        axes.axvline(x, color="grey", linestyle=":")
        axes.annotate(_growth_text(event), (x, height), xycoords=("data", "axes fraction"), va="top", fontsize=8)


def _growth_text(event: GrowthEvent) -> str:
    into = f" {DONE[event.change]} into {event.stage}"
    if not event.certificate:
        return into
    last = event.certificate.comparisons[-1]
    return f"{into}\n loss before {last.loss_before:.6f}\n loss after  {last.loss_after:.6f}"
