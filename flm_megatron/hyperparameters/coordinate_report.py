"""A coordinate check as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.hyperparameters.coordinate_check import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(widths: Sequence[int], measurements: Sequence[Measurement], tolerance: float | None) -> Iterator[str]:
    """Lines: each module's sizes by width, and the power of the width they follow.

    With `tolerance`, the powers that muP does not allow are marked.
    """
    yield f"{'module':26} {'quantity':10} " + " ".join(f"{width:>10}" for width in widths) + "   slope  expected"
    for found in measurements:
        sizes = " ".join(f"{size:10.3e}" for size in found.sizes)
        mark = "" if tolerance is None or found.holds(tolerance) else "  <-- broken"
        yield f"{found.module:26} {found.quantity:10} {sizes}  {found.slope:+6.2f}    {found.expected:+5.2f}{mark}"


def plot(widths: Sequence[int], results: Mapping[str, Sequence[Measurement]], path: Path) -> None:
    """Draw sizes against width on logarithmic axes: a row of plots for each parametrization in `results`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(11, 4.5 * len(results)), sharex=True, squeeze=False, layout="constrained"
    )
    for row, (name, measurements) in zip(axes, results.items(), strict=True):
        for panel, quantity in zip(row, ("activation", "update"), strict=True):
            _draw(panel, widths, [found for found in measurements if found.quantity == quantity])
            panel.set(title=f"{name}: {quantity}", ylabel="mean absolute value")
        row[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in axes[-1]:
        panel.set_xlabel("width")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(panel: Axes, widths: Sequence[int], measurements: Sequence[Measurement]) -> None:
    for found in measurements:
        panel.plot(widths, found.sizes, "o-", markersize=3, linewidth=1, label=found.module)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(widths, [str(width) for width in widths])
    panel.grid(alpha=0.3)
