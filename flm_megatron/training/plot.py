"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`; a torn last line is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def plot_loss(folder: Path, baseline: tuple[str, float] | None = None) -> Path:
    """Draw training and validation loss against tokens into `loss.png`, stage boundaries marked.

    `baseline` is a labelled loss in nats to draw across, such as the unigram entropy. Returns the picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(folder)
    train = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for stage in dict.fromkeys(line["stage"] for line in train):
        part = [line for line in train if line["stage"] == stage]
        axes.plot([x["tokens"] for x in part], [x["loss"] for x in part], linewidth=1, label=f"{stage}, training")
        axes.axvline(part[0]["tokens"], color="grey", linewidth=0.5, linestyle=":")
    axes.plot([x["tokens"] for x in validation], [x["val_loss"] for x in validation], "ko-", ms=3, label="validation")
    if baseline:
        axes.axhline(baseline[1], color="tab:red", linestyle="--", linewidth=1, label=baseline[0])
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
