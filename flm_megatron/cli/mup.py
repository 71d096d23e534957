"""Check the maximal-update parametrization."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flm_megatron.config.schema import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm mup coord-check`."""
    commands = parser.add_subparsers(dest="mup_command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "coord-check",
        help="sizes of activations and updates against width; exit status 1 if they do not follow muP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument("run_file", nargs="?", help="take the model from this run file, not a small one of its own")
    check.add_argument("--stage", help="stage of the run file; without it the first")
    check.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="the first is the base width")
    check.add_argument("--layers", type=int, help="layers, if not the model's own")
    check.add_argument("--steps", type=int, default=3, help="training steps before updates are measured")
    check.add_argument("--seeds", type=int, default=4, help="runs of each width, averaged")
    check.add_argument("--lr", type=float, default=2e-3, help="learning rate at the base width")
    check.add_argument("--tolerance", type=float, default=0.2, help="largest deviation of a power of the width")
    check.add_argument("--plot", type=Path, default=Path("coord-check.png"), help="file of the plot")


def run(args: argparse.Namespace) -> int:
    """Print the tables, draw the plot; 1 if muP is broken."""
    from flm_megatron.evaluation.coordinate_check import CheckSettings, coordinate_check
    from flm_megatron.evaluation.coordinate_report import plot, table

    settings = CheckSettings(_model(args), tuple(args.widths), args.steps, args.seeds, args.lr)
    results = {}
    for name, mup in (("muP", True), ("standard parametrization", False)):
        results[name] = coordinate_check(settings, mup)
        print(f"{name}, {args.steps} steps, mean absolute values by width")
        print("\n".join(table(settings.widths, results[name], args.tolerance if mup else None)), end="\n\n")
    plot(settings.widths, results, args.plot)
    broken = [found for found in results["muP"] if not found.holds(args.tolerance)]
    print(f"plot: {args.plot}")
    if broken:
        print(f"muP is broken: {len(broken)} of {len(results['muP'])} sizes do not follow the width as they should")
        return 1
    print("muP holds: sizes do not depend on the width")
    return 0


def _model(args: argparse.Namespace) -> ModelConfig:
    """The model of the run file's stage, or the check's own; a small vocabulary does, since no width enters it."""
    from flm_megatron.config.loader import load_run
    from flm_megatron.errors import RequestError
    from flm_megatron.evaluation.coordinate_check import DEFAULT_MODEL

    if args.run_file is None:
        return replace(DEFAULT_MODEL, num_layers=args.layers or DEFAULT_MODEL.num_layers)
    stages = {stage.name: stage for stage in load_run(args.run_file).stages}
    name = args.stage or next(iter(stages))
    if name not in stages:
        raise RequestError(f"{args.run_file} has no stage {name!r}; it has {', '.join(stages)}")
    model = stages[name].model
    return replace(model, num_layers=args.layers or model.num_layers, vocab_size=DEFAULT_MODEL.vocab_size)
