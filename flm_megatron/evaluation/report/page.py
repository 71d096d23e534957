"""The report's page: everything in one file, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from flm_megatron.config.loader import dump_run
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.report.chart import Chart
from flm_megatron.evaluation.report.curves import AXES, detail_charts, loss_charts
from flm_megatron.evaluation.report.history import History, read_history
from flm_megatron.evaluation.report.tables import events_table, goodput_table, growths_table, runs_table, stages_table
from flm_megatron.training.metrics.flops import CONVENTION

HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page over the runs in `folders` to `out`.

    Raises:
        RequestError: a folder is no run's or has no step yet, or the page cannot be written.
    """
    text = page(distinctly_named([read_history(folder) for folder in folders]))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}") from None


def distinctly_named(histories: Sequence[History]) -> list[History]:
    """The same runs, those of one name told apart by their folders."""
    names = [history.name for history in histories]
    return [
        replace(history, name=f"{history.name} ({history.folder})") if names.count(history.name) > 1 else history
        for history in histories
    ]


def page(histories: Sequence[History]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    title = " against ".join(history.name for history in histories)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">FLOPs are {escape(CONVENTION)}. Time is the sum of step times, without starts and saves.</p>',
        runs_table(histories),
        _loss_section(histories),
        _titled("Growth", growths_table(histories)),
        _titled("Course of training", _charts(detail_charts(histories))),
        _titled("Stages", stages_table(histories)),
        _titled("Where the time went", goodput_table(histories) or "<p>Not metered.</p>"),
        _titled("Restarts, changes and refused steps", events_table(histories) or "<p>None.</p>"),
        _titled("Run files", "".join(_run_file(history) for history in histories)),
    ]
    style, script = (HERE / "page.css").read_text(), (HERE / "page.js").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _loss_section(histories: Sequence[History]) -> str:
    """The loss, with a choice of what it is drawn against."""
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" * (axis == "tokens")}> {name}</label>'
        for axis, name in AXES.items()
    )
    charts = "".join(f'<div class="by {axis}">{chart.figure()}</div>' for axis, chart in loss_charts(histories))
    return f'<section><h2>Loss</h2><div class="axes">against {choices}</div>{charts}</section>'


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(chart.figure() for chart in charts)}</div>'


def _titled(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _run_file(history: History) -> str:
    return f"<details><summary>{escape(history.name)}</summary><pre>{escape(dump_run(history.run))}</pre></details>"
