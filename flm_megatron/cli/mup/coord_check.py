"""Check that the sizes of activations and updates do not depend on the width."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.mup.stage import chosen_stage
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import layers, path, positive, real, width

if TYPE_CHECKING:
    from flm_megatron.config.schema import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm mup coord-check`."""
    parser.add_argument(
        "run_file", type=path, nargs="?", help="take the model from this run file, not a small one of its own"
    )
    parser.add_argument("--stage", help="stage of the run file; without it the first")
    parser.add_argument(
        "--widths", type=width, nargs="+", default=[64, 128, 256, 512], help="the first is the base width"
    )
    parser.add_argument("--layers", type=layers, help="layers, if not the model's own")
    parser.add_argument("--steps", type=positive, default=3, help="training steps before updates are measured")
    parser.add_argument("--seeds", type=positive, default=4, help="runs of each width, averaged")
    parser.add_argument("--lr", type=real(0.0, above=True), default=2e-3, help="learning rate at the base width")
    parser.add_argument("--tolerance", type=real(0.0), default=0.2, help="largest deviation of a power of the width")
    add_json(parser)
    parser.add_argument("--plot", type=path, default=Path("coord-check.png"), help="file of the plot")


def run(args: argparse.Namespace) -> int:
    """Print the tables, draw the plot; 1 if muP is broken."""
    from flm_megatron.hyperparameters.coordinate_check import CheckSettings, coordinate_check
    from flm_megatron.hyperparameters.coordinate_report import plot, table
    from flm_megatron.paths import require_picture

    require_picture(args.plot, "--plot")
    settings = CheckSettings(_model(args), tuple(args.widths), args.steps, args.seeds, args.lr)
    results = {}
    for name, mup in (("muP", True), ("standard parametrization", False)):
        results[name] = coordinate_check(settings, mup)
        if not args.json:
            print(f"{name}, {args.steps} steps, mean absolute values by width")
            print("\n".join(table(settings.widths, results[name], args.tolerance if mup else None)), end="\n\n")
    plot(settings.widths, results, args.plot)
    broken = [found for found in results["muP"] if not found.holds(args.tolerance)]
    if args.json:
        measured = {name: [vars(each) for each in found] for name, found in results.items()}
        print_json({"widths": settings.widths, "results": measured, "plot": args.plot, "holds": not broken})
        return 1 if broken else 0
    print(f"plot: {args.plot}")
    if broken:
        print(f"muP is broken: {len(broken)} of {len(results['muP'])} sizes do not follow the width as they should")
        return 1
    print("muP holds: sizes do not depend on the width")
    return 0


def _model(args: argparse.Namespace) -> ModelConfig:
    """The model of the run file's stage, or the check's own; a small vocabulary does, since no width enters it."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.hyperparameters.coordinate_check import DEFAULT_MODEL

    if args.run_file is None:
        return replace(DEFAULT_MODEL, num_layers=args.layers or DEFAULT_MODEL.num_layers)
    model = chosen_stage(open_run(args.run_file), args).model
    return replace(model, num_layers=args.layers or model.num_layers, vocab_size=DEFAULT_MODEL.vocab_size)
