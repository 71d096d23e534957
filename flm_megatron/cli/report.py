"""Show a run, or several compared, as one self-contained HTML page: loss, growth and what it saved, speed, restarts."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm report`."""
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="output folder of a run")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--scratch",
        nargs="+",
        type=path,
        default=[],
        metavar="RUN_DIR",
        help="runs of the last stage's model from scratch, beside which the FLOPs that growth saved are measured; of "
        "several the ends (default: runs of one stage among RUN_DIR that have its shape)",
    )
    beside.add_argument(
        "--laws",
        type=path,
        metavar="FILE",
        help="YAML of loss laws by stage, as for `flm plan`, in place of such a run",
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="page to write; report.html in the first folder")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is; returns 0."""
    from flm_megatron.evaluation.report.page import write_report
    from flm_megatron.paths import require_file

    out = args.out or args.runs[0] / "report.html"
    if args.out:
        require_file(out, "--out")
    write_report(args.runs, out, args.scratch, args.laws)
    print(f"report: {out}")
    return 0
