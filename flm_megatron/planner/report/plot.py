"""Memory of every pipeline rank as a picture."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.errors import RequestError
from flm_megatron.planner.cost.memory import GIB, RankMemory
from flm_megatron.planner.plan import RunPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_memory(plan: RunPlan, path: Path) -> Path:
    """Draw stacked bars of what each pipeline rank holds, one panel per stage, with the accelerator's memory across.

    Returns the picture's path.

    Raises:
        RequestError: the picture cannot be written there, or not in that form.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(plan.stages), 1, figsize=(9, 2.6 * len(plan.stages) + 0.8), layout="constrained", squeeze=False
    )
    for stage, axes in zip(plan.stages, panels[:, 0], strict=True):
        ranks = range(len(stage.memory))
        bottom = [0.0] * len(stage.memory)
        for field in fields(RankMemory):
            heights = [getattr(memory, field.name) / GIB for memory in stage.memory]
            axes.bar(ranks, heights, bottom=bottom, label=field.name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.axhline(plan.machine.hardware.memory_gib, color="black", linestyle="--", linewidth=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(ylabel="GiB", title=f"{stage.name} on {plan.gpus} {plan.machine.name}")
    panels[-1, 0].set_xlabel("pipeline rank (dashed: memory of the accelerator)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=8)
    return save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> Path:
    """Write a figure of pyplot's and close it, written or not; returns the picture's path.

    Raises:
        RequestError: the picture cannot be written there, or not in that form.
    """
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot draw to {path}: {' '.join(str(error).split())}") from None
    finally:
        pyplot.close(figure)
    return path
