"""Where the wall time of each run went, as a bar over its table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from flm_megatron.evaluation.report.history import History
from flm_megatron.training.metrics.goodput import Goodput

COUNTED = "steps that count"
LEAST = 0.001
"""Share of the wall time below which a part is not drawn."""
COLOURS = 6


def goodput_bars(histories: Sequence[History]) -> str:
    """A bar for each run that metered its time, and what the colours are; empty without any."""
    metered = [(history.name, shares(history.goodput)) for history in histories if history.goodput]
    drawn = {part for _, found in metered for part in found}
    names = [name for name in (COUNTED, *Goodput().parts) if name in drawn]
    if not names:
        return ""
    bars = "".join(f"<figcaption>{escape(name)}</figcaption>{_bar(found, names)}" for name, found in metered if found)
    legend = "".join(f'<li><i style="{_paint(index)}"></i>{escape(name)}</li>' for index, name in enumerate(names))
    return f'<figure class="bars">{bars}<ul>{legend}</ul></figure>'


def shares(goodput: Goodput) -> dict[str, float]:
    """Share of the wall time of everything that took some; together at most 1."""
    if not goodput.wall_s:
        return {}
    seconds = {COUNTED: goodput.steps_s - goodput.lost_s, **goodput.parts}
    whole = max(goodput.wall_s, sum(seconds.values()))
    return {name: each / whole for name, each in seconds.items() if each / whole >= LEAST}


def _bar(found: dict[str, float], names: Sequence[str]) -> str:
    parts = ""
    for index, name in enumerate(names):
        if share := found.get(name):
            parts += f'<span style="width:{100 * share:.3f}%;{_paint(index)}" title="{_said(name, share)}"></span>'
    return f'<div role="img" aria-label="{escape(", ".join(_said(*each) for each in found.items()))}">{parts}</div>'


def _said(name: str, share: float) -> str:
    return f"{name} {100 * share:.1f}%"


def _paint(index: int) -> str:
    """A colour of the curves; beyond the last they are used again, fainter."""
    return f"background:var(--c{index % COLOURS});opacity:{1 / (1 + index // COLOURS):.2g}"
