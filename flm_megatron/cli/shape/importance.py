"""Measure how much each hidden channel, feed-forward unit, head and layer of a checkpoint matters, to shrink by.

Without a run file the checkpoint's own tokenizer reads a text: `flm importance base --text book.txt --out FILE`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import location, path, whole
from flm_megatron.cli.shape.changed_stage import require_no_stage
from flm_megatron.growth.shrink.rules import CRITERIA

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig

EPILOG = """\
Criteria: `activation` is the mean absolute output of norms, the mean absolute input of the second matrix of the
feed-forward layer, the norm of each head's output; `influence` is 1 - cos(input, output) of a layer; `gradient` is the
mean absolute change of the loss, to first order, without the unit: it takes a backward pass. Any field of the run
file can be overridden: --stages.1.parallel.tensor 2. Without a run file, options are fields of the one stage
(--parallel.tensor 2, --precision bf16) or of the run (--tokenizer FILE, --data.sequence_length 512)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm importance`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("checkpoint", type=location, help="checkpoint to measure")
    parser.add_argument(
        "run_file", type=path, nargs="?", help="run file (YAML) with layout, tokenizer and data; none needs --text"
    )
    parser.add_argument(
        "--stage",
        help="stage of the run file whose layout, precision and, if it shrinks, criteria are used (default: the "
        "checkpoint's own layout and precision)",
    )
    parser.add_argument(
        "--text", type=path, metavar="FILE", help="text file to measure on (default: the run's validation data)"
    )
    parser.add_argument("--samples", type=whole(1, 100_000), default=16, help="samples to measure on (default: 16)")
    for dimension, criteria in CRITERIA.items():
        parser.add_argument(
            f"--{dimension}",
            choices=criteria,
            help=f"criterion of {dimension} (default: that of the --stage, or {criteria[0]})",
        )
    parser.add_argument("--out", type=path, metavar="FILE", help="write the importance, to shrink by")
    add_json(parser)
    parser.epilog = EPILOG
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what the options ask for; returns 0."""
    from flm_megatron.api.shape.importance import measure_importance
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.growth.shrink.table import importance_data, importance_table
    from flm_megatron.paths import require_file

    if args.out:
        require_file(args.out, "--out")
    run, stage = _asked_for(args)
    criteria = {dimension: given for dimension in CRITERIA if (given := getattr(args, dimension))}
    found = measure_importance(
        args.checkpoint, run, stage=stage, text=args.text, samples=args.samples, criteria=criteria
    )
    if is_first_process():
        print_json(importance_data(found)) if args.json else print(importance_table(found))
        if args.out:
            found.save(args.out)
    return 0


def _asked_for(args: argparse.Namespace) -> tuple[RunConfig, str | None]:
    """The run, and the stage of it whose layout is used."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.errors import RequestError
    from flm_megatron.growth.lone_change import run_of_change

    if args.run_file:
        return open_run(args.run_file, args.overrides), args.stage
    require_no_stage(args)
    if not args.text:
        raise RequestError("there is nothing to measure on: give a run file, whose validation data are read, or --text")
    run = run_of_change(open_checkpoint(args.checkpoint), str(args.checkpoint), args.overrides, {}, "measured")
    if run.stages[1].model != run.stages[0].model:
        raise RequestError("options may not change the model that is measured: leave out --model")
    return run, run.stages[1].name
