"""Measure how near each layer of a checkpoint is to the identity, to choose the layers that growth copies."""

from __future__ import annotations

import argparse
from functools import partial

from flm_megatron.cli.options.parser import path, whole
from flm_megatron.paths import require_file, require_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm distance`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("checkpoint", type=path, help="checkpoint to measure")
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
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what is asked for."""
    import torch.distributed as dist

    from flm_megatron.checkpoint.described import recorded_model
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.stage_names import stage_index
    from flm_megatron.distributed.world import layout, tool_world
    from flm_megatron.growth.distance import distance_table, layer_distances, plot_distances, write_distances
    from flm_megatron.growth.foreseen import check_run_file
    from flm_megatron.growth.text import file_tokens, run_tokens

    if args.out:
        require_file(args.out, "--out")
    if args.plot:
        require_picture(args.plot, "--plot")
    config = open_run(args.run_file, args.overrides)
    check_run_file(config)
    view = open_checkpoint(args.checkpoint)
    stage = config.stages[stage_index(config, view.manifest.get("stage") or config.stages[0].name)]
    tokens = file_tokens(args.text, config, args.samples) if args.text else run_tokens(config, args.samples)
    with tool_world(config.distributed):
        place = partial(layout, timeout_s=config.distributed.timeout_s)
        model = recorded_model(view, stage.model.vocab_size) or stage.model
        found = layer_distances(view, model, stage, tokens[:, :-1], place)
        first = dist.get_rank() == 0
    if first:
        print(distance_table(found))
        if args.out:
            write_distances(found, args.out)
        if args.plot:
            plot_distances(found, args.plot)
    return 0
