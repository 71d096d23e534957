"""Show a run, or several compared, as one self-contained HTML page: loss, growth, validation, speed, restarts."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm report`."""
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--out", type=path, metavar="FILE", help="page to write; report.html in the first folder")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is; returns 0."""
    from flm_megatron.evaluation.report.page import write_report
    from flm_megatron.paths import require_file

    out = args.out or args.runs[0] / "report.html"
    if args.out:
        require_file(out, "--out")
    write_report(args.runs, out)
    print(f"report: {out}")
    return 0
