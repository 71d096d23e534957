"""Charts as data: what `charts.js` draws with uPlot, inside the figure that shows it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

MOST_POINTS = 800
Point = tuple[float, ...]
"""One x for each of the chart's x axes, then y."""


@dataclass(frozen=True)
class Series:
    """A named line; `colour` counts from 0, and beyond the last colour lines are dashed."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Bracket:
    """A named distance along the x axis, from `start` to `end` at the height `y`."""

    start: float
    end: float
    y: float
    name: str


@dataclass(frozen=True)
class HeatRow:
    """Values of one layer over the places at which they were measured: (x of each axis, ..., value)."""

    layer: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Lines, or layers as rows of a heat map, over an x axis that the reader chooses among `x_labels`.

    `marks` are places on the x axes, each one x for each of `x_labels` and a name.
    """

    title: str
    x_labels: Sequence[str]
    y_label: str
    series: Sequence[Series] = ()
    marks: Sequence[tuple[tuple[float, ...], str]] = field(default_factory=list)
    log_y: bool = False
    log_x: bool = False
    brackets: Sequence[Bracket] = ()
    heat: Sequence[HeatRow] = ()
    wide: bool = False

    def to_json(self) -> dict[str, object]:
        """The chart as plain data, points as columns; points that are not finite are left out."""
        rows = [
            {"name": line.name, "colour": line.colour, "dots": line.dots, "columns": _columns(line.points)}
            for line in self.series
        ]
        return {
            "x": list(self.x_labels),
            "y": self.y_label,
            "logX": self.log_x,
            "logY": self.log_y,
            "series": rows,
            "heat": [{"layer": row.layer, "columns": _columns(row.points)} for row in self.heat],
            "marks": [[*place, name] for place, name in self.marks],
            "brackets": [[_far(each.start), _far(each.end), each.y, each.name] for each in self.brackets],
        }

    def figure(self) -> str:
        """An HTML figure that holds the title and the data."""
        data = json.dumps(self.to_json(), allow_nan=False).replace("<", "\\u003c")
        return (
            f'<figure class="chart{" wide-chart" * self.wide}" tabindex="0" role="group"'
            f' aria-label="{escape(self.title)}"><figcaption><h3>{escape(self.title)}</h3></figcaption>'
            f'<script type="application/json">{data}</script></figure>'
        )


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that keep every extreme: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        chosen = {min(part, key=lambda i: points[i][-1]), max(part, key=lambda i: points[i][-1])}
        kept += [points[i] for i in sorted(chosen)]
    return kept


def _far(value: float) -> float:
    """The value; for infinity, which JSON has not, the largest number."""
    return max(-sys.float_info.max, min(value, sys.float_info.max))


def _columns(points: Sequence[Point]) -> list[list[float]]:
    """The finite points, thinned, one list for each x and one for y, to seven digits."""
    kept = thin([point for point in points if all(map(math.isfinite, point))])
    return [[float(f"{value:.7g}") for value in column] for column in zip(*kept, strict=True)]
