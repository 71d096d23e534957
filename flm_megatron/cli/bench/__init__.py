"""Measure the throughput of a stage on this hardware with synthetic tokens, or calibrate the planner to it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from flm_megatron.cli.bench.calibrate import calibrate
from flm_megatron.cli.options.output import add_json
from flm_megatron.cli.options.parser import count, path, positive, processes, take_overrides
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_folder
from flm_megatron.planner.chosen_stages import only_stage, with_vocabulary

if TYPE_CHECKING:
    from flm_megatron.benchmarking.workload import Request
    from flm_megatron.config.schema import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm bench`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, nargs="?", help="run file (YAML); not with --calibrate")
    parser.add_argument("--stage", help="the stage to measure; may be left out where there is one")
    parser.add_argument("--layers", type=positive, metavar="N", help="measure a stack of N layers of the stage's shape")
    parser.add_argument(
        "--layouts", type=processes, nargs="+", metavar="N", help="measure every layout of N local processes"
    )
    parser.add_argument(
        "--compare",
        metavar="NAMES",
        help="measure other programs beside, in turn: transformers, transformers-compiled, bare-megatron, torchtitan",
    )
    parser.add_argument(
        "--calibrate", type=path, metavar="OUT.yaml", help="time products and copies on this device for `flm plan`"
    )
    parser.add_argument("--steps", type=positive, default=20, help="measured steps (default 20)")
    parser.add_argument("--warmup", type=count, default=3, help="steps before that do not count (default 3)")
    parser.add_argument(
        "--profile", type=count, default=3, metavar="STEPS", help="steps that are divided into parts (default 3)"
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="also write bench-STAGE.md, .json and .svg here")
    add_json(parser)
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the report and write it; returns 0."""
    if args.calibrate is not None:
        return calibrate(args)
    if args.run_file is None:
        raise RequestError("give a run file to measure a stage of, or --calibrate OUT.yaml")
    from flm_megatron.benchmarking.run import Wanted, benchmark

    if args.out is not None:
        require_folder(args.out, "--out")
    config = _config(args)
    wanted = Wanted(list(dict.fromkeys(args.layouts or [])), args.compare.split(",") if args.compare else None)
    report = benchmark(_request(config, args), wanted)
    if report is None:  # another rank reports
        return 0
    print(report.json() if args.json else report.markdown().rstrip("\n"))
    if args.out is not None:
        paths = report.write(args.out, f"bench-{config.stages[0].name}")
        print("\nwritten: " + ", ".join(map(str, paths)), file=sys.stderr if args.json else sys.stdout)
    return 0


def _config(args: argparse.Namespace) -> RunConfig:
    """The run with the stage to measure alone, its sizes checked."""
    from flm_megatron.benchmarking.workload import layer_stack
    from flm_megatron.checkpoint.run_file import open_run

    config = open_run(args.run_file, args.overrides)
    if args.stage is None and len(config.stages) > 1:
        raise RequestError(f"give --stage: the run has {', '.join(stage.name for stage in config.stages)}")
    config = only_stage(config, args.stage)
    if args.layers:
        config = replace(config, stages=[layer_stack(config.stages[0], args.layers)])
    config = with_vocabulary(config)
    return config if args.layouts else _on_its_processes(config)


def _on_its_processes(config: RunConfig) -> RunConfig:
    """The run with the data-parallel size that a launcher's processes leave, or that the run file asks for here.

    Raises:
        RequestError: a rule of the run file is broken.
    """
    from flm_megatron.config.rules import check
    from flm_megatron.launch.run import local_processes

    stage = config.stages[0]
    size = int(os.environ.get("WORLD_SIZE", 0)) or local_processes(config, stage)
    # A benchmark needs no budget, but the rules do.
    check(replace(config, stages=[replace(stage, tokens=max(stage.tokens, 1))]), size)
    parallel = replace(stage.parallel, data=size // stage.parallel.model_size)
    return replace(config, stages=[replace(stage, parallel=parallel)])


def _request(config: RunConfig, args: argparse.Namespace) -> Request:
    from flm_megatron.benchmarking.workload import Request

    return Request(
        stage=config.stages[0],
        sequence_length=config.data.sequence_length,
        kernels=config.kernels,
        steps=args.steps,
        warmup=args.warmup,
        profiled=args.profile,
        timeout_s=config.distributed.timeout_s,
    )
