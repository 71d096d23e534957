"""Tables and the picture of the study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.results import Line, Saving, lines
from benchmarks.growth.study.runs import SCRATCH, Result
from benchmarks.growth.study.sizes import Sizes

COLOURS = {"depth": "tab:blue", "width": "tab:red", "both": "tab:purple"}
MARKERS = "osD^v"
APART = 1.03
"""Factor between the places of arms of one budget in the picture."""


def scratch_table(results: Sequence[Result]) -> str:
    """Loss from scratch at each budget."""
    by_budget: dict[float, list[Result]] = defaultdict(list)
    for result in results:
        if result.arm == SCRATCH:
            by_budget[result.budget].append(result)
    rows = ["| tokens per parameter | FLOPs | loss (seeds) | spread |", "|---|---|---|---|"]
    for budget, ends in sorted(by_budget.items()):
        losses = [end.loss for end in sorted(ends, key=lambda end: end.seed)]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        rows.append(f"| {budget:g} | {ends[0].flops:.3g} | {_listed(losses)} | {spread} |")
    return "\n".join(rows)


def grown_table(found: Sequence[Line], sizes: Sizes) -> str:
    """Saving, its spread and the token credit of every arm."""
    rows = [
        "| tokens per parameter | grown at | arm | loss (seeds) | FLOPs saved (seeds) | token credit | break-even |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        even = sizes.flops(ARMS[line.arm].small) / sizes.flops("large")
        credits = [s.credit for s in line.savings if s.credit is not None]
        credit = f"{fmean(credits):.2f}" if line.known else "-"
        at = f"{line.grown_at / line.budget:.0%}"
        rows.append(
            f"| {line.budget:g} | {at} | {line.arm} | {_listed(line.losses)} | {_saved(line)} | {credit} | {even:.2f} |"
        )
    return "\n".join(rows)


def plot(found: Sequence[Line], path: Path) -> None:
    """What each arm saved over tokens per parameter, with the range of its seeds; arms of one budget are unnamed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of_arm: dict[str, list[Line]] = defaultdict(list)
    for line in found:
        if line.least:
            of_arm[line.arm].append(line)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axes.axhline(0.0, color="black", linewidth=1)
    for number, (arm, own) in enumerate(of_arm.items()):
        places = [line.budget * APART ** (number % 5 - 2) for line in own]
        means = [fmean(line.least) for line in own]
        colour = COLOURS[arm.split(":")[0]]
        if len({line.budget for line in own}) == 1:
            axes.plot(places, means, ".", color=colour, alpha=0.5)
            continue
        spread = [[abs(end(line.least) - mean) for line, mean in zip(own, means, strict=True)] for end in (min, max)]
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(places, means, spread, color=colour, marker=marker, linestyle="none", capsize=3, label=arm)
    axes.set_xscale("log")
    ticks = sorted({line.budget for line in found})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens per parameter")
    axes.set_ylabel("share of the FLOPs from scratch that growth saved")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(results: Sequence[Result], sizes: Sizes, out: Path) -> str:
    """Write tables.md and study.png into `out`; the tables."""
    found = lines(results, sizes.flops("large"))
    text = f"{scratch_table(results)}\n\n{grown_table(found, sizes)}\n"
    (out / "tables.md").write_text(text)
    if results:
        plot(found, out / "study.png")
    return text


def _listed(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def _saved(line: Line) -> str:
    """The saving with its spread; what is not beyond twice the spread is not claimed."""
    if not line.known:
        return ", ".join(_known(saving) for saving in line.savings)
    listed = ", ".join(f"{share:.0%}" for share in line.saved)
    return f"{line.mean:.0%} ({listed}){'' if line.claimed else ', not claimed'}"


def _known(saving: Saving) -> str:
    if saving.saved is not None:
        return f"{saving.saved:.0%}"
    bound = saving.saved_more_than
    return "above the curve from scratch" if bound is None else f"more than {bound:.0%}"
