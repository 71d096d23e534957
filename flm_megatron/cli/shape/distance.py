"""Measure how near each layer of a checkpoint is to the identity, to choose the layers that growth copies."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import location, path, whole
from flm_megatron.paths import require_file, require_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm distance`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("checkpoint", type=location, help="checkpoint to measure")
    parser.add_argument(
        "run_file", type=path, help="run file (YAML) with the checkpoint's stage: its layout, tokenizer and data"
    )
    parser.add_argument(
        "--text", type=path, metavar="FILE", help="text file to measure on (default: the run's validation data)"
    )
    parser.add_argument("--samples", type=whole(1, 100_000), default=8, help="samples to measure on (default: 8)")
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="write the distances as JSON, for `flm grow --distances`"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the distances into a picture")
    add_json(parser)
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what the options ask for; returns 0."""
    from flm_megatron.api.shape.distance import layer_distances
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.growth.distance import distance_table, plot_distances, write_distances

    if args.out:
        require_file(args.out, "--out")
    if args.plot:
        require_picture(args.plot, "--plot")
    config = open_run(args.run_file, args.overrides)
    found = layer_distances(args.checkpoint, config, text=args.text, samples=args.samples)
    if is_first_process():
        print_json({"layers": [vars(layer) for layer in found]}) if args.json else print(distance_table(found))
        if args.out:
            write_distances(found, args.out)
        if args.plot:
            plot_distances(found, args.plot)
    return 0
