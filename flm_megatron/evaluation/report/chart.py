"""Line charts as SVG in the page itself, coloured by its style sheet; a script adds a reading under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from flm_megatron.evaluation.report.scale import Scale, label, scale_over

LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 40
LETTER, LINE = 7, 14
"""About the width of a letter and the height of a line of text."""
COLOURS = 6
MOST_POINTS = 800
Point = tuple[float, float]


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
class Chart:
    """Lines over one x axis; `marks` are named places on it. Sizes are in pixels, text has one size in all."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[tuple[float, str]] = field(default_factory=list)
    log_y: bool = False
    width: int = 760
    height: int = 300
    log_x: bool = False
    brackets: Sequence[Bracket] = ()

    def svg(self) -> str:
        """The picture as an SVG element. Points that are not finite are left out."""
        thinned = [(line, thin(_drawable(line.points, self.log_x, self.log_y))) for line in self.series]
        xs = [x for _, points in thinned for x, _ in points]
        ys = [y for _, points in thinned for _, y in points]
        x = scale_over(xs, LEFT, self.width - RIGHT, self.log_x)
        y = scale_over(ys, self.height - BOTTOM, TOP, self.log_y)
        middle = (LEFT + self.width - RIGHT) / 2
        parts = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}"'
            f' data-lines="{escape(_readings(thinned, x, y))}">',
            *_grid(x, y),
            *_marks([(x.pixel(at), name) for at, name in self.marks if x.low <= at <= x.high], y.start, self.width),
            *(_line(line, points, x, y) for line, points in thinned),
            *(_bracket(bracket, x, y, self.width) for bracket in self.brackets),
            f'<text class="axis" x="{middle}" y="{self.height - 6}">{escape(self.x_label)}</text>',
            f'<text class="axis" x="{LEFT}" y="12" style="text-anchor:start">{escape(self.y_label)}</text>',
            "</svg>",
        ]
        return "\n".join(parts)

    def figure(self) -> str:
        """The picture with its title and legend, as an HTML figure."""
        legend = "".join(f'<span class="{_class(line)}"><i></i>{escape(line.name)}</span>' for line in self.series)
        return (
            f"<figure><figcaption><h3>{escape(self.title)}</h3>"
            f'<div class="legend">{legend}</div></figcaption>{self.svg()}</figure>'
        )


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that keep every extreme: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        chosen = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(chosen)]
    return kept


def _drawable(points: Sequence[Point], log_x: bool, log_y: bool) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [(x, y) for x, y in finite if (x > 0 or not log_x) and (y > 0 or not log_y)]


def _class(line: Series) -> str:
    return f"c{line.colour % COLOURS}{' dashed' if line.colour >= COLOURS else ''}"


def _line(line: Series, points: Sequence[Point], x: Scale, y: Scale) -> str:
    pixels = [(x.pixel(a), y.pixel(b)) for a, b in points]
    path = f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in pixels)}"/>'
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in pixels) if _dotted(line, points) else ""
    return f'<g class="line {_class(line)}">{path}{dots}</g>'


def _bracket(bracket: Bracket, x: Scale, y: Scale, width: float) -> str:
    """A line with an upright at both ends, its name below it, inside of `width`; beyond the x axis it is cut off."""
    ends = sorted((bracket.start, bracket.end))
    left, right = (x.pixel(min(max(at, x.low), x.high)) for at in ends)
    height, half = y.pixel(bracket.y), LETTER * len(bracket.name) / 2
    uprights = "".join(f"M{x.pixel(at):.1f},{height - 5:.1f}v10" for at in ends if x.low <= at <= x.high)
    middle = max(half, min((left + right) / 2, width - half))
    return (
        f'<g class="bracket"><path d="M{left:.1f},{height:.1f}H{right:.1f}{uprights}"/>'
        f'<text class="marked" x="{middle:.1f}" y="{height + 18:.1f}">{escape(bracket.name)}</text></g>'
    )


def _dotted(line: Series, points: Sequence[Point]) -> bool:
    return len(points) == 1 or (line.dots and len(points) <= 100)


def _grid(x: Scale, y: Scale) -> list[str]:
    rows = [
        f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y.pixel(v):.1f}" y2="{y.pixel(v):.1f}"/>'
        f'<text class="tick" x="{x.start - 6}" y="{y.pixel(v) + 4:.1f}" style="text-anchor:end">{label(v)}</text>'
        for v in y.ticks()
    ]
    columns = [f'<text class="tick" x="{x.pixel(v):.1f}" y="{y.start + 16}">{label(v)}</text>' for v in x.ticks(8)]
    return [*rows, *columns]


def _marks(marks: Sequence[tuple[float, str]], bottom: float, width: float) -> list[str]:
    """Lines down to `bottom` at pixels, inside of `width`, their names one below the other where they would meet."""
    ends: list[float] = []
    parts = []
    for at, name in sorted(marks):
        half = LETTER * len(name) / 2
        middle = max(half, min(at, width - half))
        row = next((row for row, end in enumerate(ends) if end < middle - half), len(ends))
        ends[row : row + 1] = [middle + half]
        parts.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text class="marked" x="{middle:.1f}" y="{TOP - 6 + row * LINE}">{escape(name)}</text>'
        )
    return parts


def _readings(lines: Sequence[tuple[Series, Sequence[Point]]], x: Scale, y: Scale) -> str:
    """What the script shows under the pointer: for each line its name, class, and pixels with values as text."""
    return json.dumps(
        [
            {
                "name": line.name,
                "class": _class(line),
                "points": [[round(x.pixel(a), 1), round(y.pixel(b), 1), label(a), f"{b:.5g}"] for a, b in points],
            }
            for line, points in lines
        ]
    )
