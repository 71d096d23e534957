"""The report's page: everything in one file, light or dark as the reader's system is; charts are drawn by uPlot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from flm_megatron.config.loader import dump_run
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.report.bars import goodput_bars
from flm_megatron.evaluation.report.chart import Chart
from flm_megatron.evaluation.report.curves import AXES, detail_charts, loss_chart
from flm_megatron.evaluation.report.growth_charts import growth_charts
from flm_megatron.evaluation.report.history import History, read_history
from flm_megatron.evaluation.report.layers import layer_charts
from flm_megatron.evaluation.report.saving import Savings, savings
from flm_megatron.evaluation.report.tables import (
    events_table,
    goodput_table,
    growths_table,
    runs_table,
    saving_table,
    stages_table,
)
from flm_megatron.training.metrics.flops import CONVENTION

ASSETS = Path(__file__).parent / "assets"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
SAVING_NOTE = (
    "Saved is 1 - T / T_eq: T are the FLOPs of all stages, T_eq those at which training from scratch first has the "
    "grown run's final loss. Token credit is (tokens of T_eq - tokens of the large stage) / tokens of the small ones; "
    "growth has paid where it is above the ratio of their FLOPs per token, small over large. Beyond its ends the curve "
    "is not continued: then a bound is given; a law is taken as it stands. A run whose learning rate had not decayed "
    "yet makes T_eq too large; several runs from scratch are compared by their ends. Training losses are means over a "
    "fiftieth of the steps."
)


def write_report(folders: Sequence[Path], out: Path, scratch: Sequence[Path] = (), laws: Path | None = None) -> None:
    """Write the page over the runs in `folders` to `out`; grown ones are compared as `savings` does.

    Raises:
        RequestError: a folder is no run's or has no step yet, runs or laws to compare with do not fit, or the page
            cannot be written.
    """
    text = page(*read_runs(folders, scratch, laws))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}") from None


def read_runs(
    folders: Sequence[Path], scratch: Sequence[Path] = (), laws: Path | None = None
) -> tuple[list[History], Savings | None]:
    """The runs to show, and what growth saved in them; raises as `write_report` does."""
    histories = distinctly_named([read_history(folder) for folder in folders])
    compared = savings(histories, [read_history(folder) for folder in scratch], laws)
    if compared is None and (scratch or laws):
        raise RequestError(f"none of {', '.join(map(str, folders))} has grown: there is nothing to compare")
    return histories, compared


def distinctly_named(histories: Sequence[History]) -> list[History]:
    """The same runs, those of one name told apart by their folders."""
    names = [history.name for history in histories]
    return [
        replace(history, name=f"{history.name} ({history.folder})") if names.count(history.name) > 1 else history
        for history in histories
    ]


def page(histories: Sequence[History], compared: Savings | None = None) -> str:
    """The page as HTML. It loads nothing from anywhere."""
    return framed(title_of(histories), main_part(histories, compared))


def title_of(histories: Sequence[History]) -> str:
    """The runs' names."""
    return " against ".join(history.name for history in histories)


def framed(title: str, main: str, live: bool = False) -> str:
    """A page around its main part (HTML); if `live`, it asks the server it is from for what is new."""
    title = escape(title)
    scripts = ["uplot.min.js", "charts.js", *(["live.js"] if live else [])]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{title}</title>\n'
        f"<style>\n{_asset('uplot.min.css')}{_asset('page.css')}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{_controls()}\n<main>\n{main}\n</main>\n"
        + "".join(f"<script>\n{_asset(name)}</script>\n" for name in scripts)
        + "</body>\n</html>\n"
    )


def main_part(histories: Sequence[History], compared: Savings | None = None) -> str:
    """What changes of the page while a run goes on."""
    grown, layers = growth_charts(histories), layer_charts(histories)
    parts = [
        f'<p class="note">FLOPs are {escape(CONVENTION)}. Time is the sum of step times, without starts and saves.</p>',
        runs_table(histories),
        _titled("Loss", loss_chart(histories).figure()),
        _titled("Changes of shape", growths_table(histories)),
        _titled("What growth saved", _saving_section(compared) if compared else ""),
        _titled("Old and new entries", _charts(grown) if grown else ""),
        _titled("Course of training", _charts(detail_charts(histories))),
        _titled("Layers", _charts(layers) if layers else ""),
        _titled("Stages", stages_table(histories)),
        _titled("Where the time went", goodput_bars(histories) + (goodput_table(histories) or "<p>Not metered.</p>")),
        _titled("Restarts, changes and refused steps", events_table(histories) or "<p>None.</p>"),
        _titled("Run files", "".join(_run_file(history) for history in histories)),
    ]
    return "\n".join(parts)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8") + "\n"


def _controls() -> str:
    """What all curves of runs are drawn against, and how."""
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{index}"{" checked" * (index == 0)}> {name}</label>'
        for index, name in enumerate(AXES)
    )
    return (
        f'<div class="axes" role="group" aria-label="x axis of the curves">against {choices}'
        '<label><input type="checkbox" name="log-x"> log x</label><span id="status" role="status"></span></div>'
        "<noscript><p>The charts are drawn by the page's script, which is switched off here.</p></noscript>"
    )


def _saving_section(compared: Savings) -> str:
    return f'<p class="note">{escape(SAVING_NOTE)}</p>{compared.chart().figure()}{saving_table(compared.rows)}'


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(chart.figure() for chart in charts)}</div>'


def _titled(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _run_file(history: History) -> str:
    return f"<details><summary>{escape(history.name)}</summary><pre>{escape(dump_run(history.run))}</pre></details>"
