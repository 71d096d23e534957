"""Heat maps of what was recorded of every layer with a step: keys `NAME/layer_NNN`, whoever recorded them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flm_megatron.evaluation.report.chart import Chart, HeatRow, Point
from flm_megatron.evaluation.report.curves import AXES, marks, place
from flm_megatron.evaluation.report.history import History

KEY = re.compile(r"(.+)/layer_(\d+)")


def layer_charts(histories: Sequence[History]) -> list[Chart]:
    """A map for each run and name, layers over steps: norms, statistics, and what hooks of the user return."""
    return [chart for history in histories for chart in _charts(histories, history)]


def _charts(histories: Sequence[History], history: History) -> list[Chart]:
    found: dict[str, dict[int, list[Point]]] = {}
    for at, step in history.steps:
        for key, value in step.extra.items():
            named = KEY.fullmatch(key)
            if named and isinstance(value, (int, float)):
                layers = found.setdefault(named[1], {})
                layers.setdefault(int(named[2]), []).append((*place(at), float(value)))
    prefix = f"{history.name}: " if len(histories) > 1 else ""
    return [
        Chart(f"{prefix}{name} by layer", AXES, "layer", marks=marks([history]), heat=_rows(layers))
        for name, layers in sorted(found.items())
    ]


def _rows(layers: dict[int, list[Point]]) -> list[HeatRow]:
    return [HeatRow(layer, points) for layer, points in sorted(layers.items())]
