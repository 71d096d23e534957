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


def plot(results: Sequence[Result], path: Path) -> None:
    """Ends of decays against FLOPs: the curve from scratch, and every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_arm: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_arm[result.arm][result.flops].append(result.loss)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for arm, ends in sorted(by_arm.items(), key=lambda item: item[0] != SCRATCH):
        points = sorted((flops, fmean(losses)) for flops, losses in ends.items())
        style = "k-o" if arm == SCRATCH else "o"
        axes.plot(*zip(*points, strict=True), style, markersize=4, label=arm)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation loss at the end of the decay, nats per token")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(results: Sequence[Result], sizes: Sizes, out: Path) -> str:
    """Write tables.md and study.png into `out`; the tables."""
    found = lines(results, sizes.flops("large"))
    text = f"{scratch_table(results)}\n\n{grown_table(found, sizes)}\n"
    (out / "tables.md").write_text(text)
    if results:
        plot(results, out / "study.png")
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
