"""Plan memory, time and cost of a run file's stages before asking for the machines."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flm_megatron.cli.options.chosen_stages import only_stage, with_vocabulary
from flm_megatron.cli.options.parser import path, positive, processes, real

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig
    from flm_megatron.planner.machine import Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm plan`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument("--gpu", required=True, help="accelerator, such as a800, h100, mi300x")
    parser.add_argument("--gpus", type=processes, required=True, help="how many")
    parser.add_argument(
        "--nodes-of", type=processes, metavar="N", help="accelerators in a node (8 unless the table differs)"
    )
    parser.add_argument("--stage", help="plan only this stage")
    parser.add_argument(
        "--hardware", type=path, metavar="FILE", help="YAML that changes what is assumed of the machine"
    )
    parser.add_argument("--search", action="store_true", help="try all layouts and rank them")
    parser.add_argument("--top", type=positive, default=10, help="layouts that --search shows (10)")
    parser.add_argument(
        "--budget", type=real(0.0, above=True), metavar="GPU_HOURS", help="say how many tokens to give each stage"
    )
    parser.add_argument(
        "--laws",
        type=path,
        metavar="FILE",
        help="YAML of loss laws by stage for --budget: floor, scale and exponent, or the path of a metrics.jsonl "
        "(arXiv 2203.15556 for stages that it leaves out)",
    )
    parser.add_argument(
        "--mtbf",
        type=real(0.0, above=True),
        metavar="GPU_HOURS",
        help="hours that one accelerator runs between failures on average: say the goodput, and how often to save "
        "(Llama 3 405B: 419 interruptions in 54 days of 16,384 GPUs, so 50,700)",
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the memory of every pipeline rank (.png, .svg)")
    parser.add_argument("--json", action="store_true", help="print plain data instead of tables")
    parser.epilog = "Any field of the run file can be overridden: --stages.0.parallel.tensor 2 (see `flm config`)."
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.paths import require_picture
    from flm_megatron.planner.layout import as_chosen
    from flm_megatron.planner.machine import find_machine

    config = with_vocabulary(only_stage(open_run(args.run_file, args.overrides), args.stage))
    machine = find_machine(args.gpu, args.nodes_of, args.hardware)
    machine = replace(machine, software=as_chosen(machine.software, config.kernels))
    if args.plot is not None:
        require_picture(args.plot, "--plot")
    if args.search:
        text, data = _search(config, machine, args)
    elif args.budget is not None:
        text, data = _budget(config, machine, args)
    else:
        text, data = _plan(config, machine, args)
    print(json.dumps(data, indent=1) if args.json else text)
    return 0


def _plan(config: RunConfig, machine: Machine, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from flm_megatron.planner.feasibility import require_fit
    from flm_megatron.planner.goodput import plan_goodput
    from flm_megatron.planner.plan import plan_run
    from flm_megatron.planner.report.plot import plot_memory
    from flm_megatron.planner.report.text import goodput_data, goodput_text, run_data, run_text

    _check(config, args.gpus)
    plan = plan_run(config, machine, args.gpus)
    if args.plot is not None:
        plot_memory(plan, args.plot)
    require_fit(config, plan)
    if args.mtbf is None:
        return run_text(plan), run_data(plan)
    goodput = plan_goodput(plan.stages, config.checkpoint, machine, args.gpus, args.mtbf)
    text = goodput_text(goodput, machine, args.mtbf)
    return f"{run_text(plan)}\n\n{text}", run_data(plan) | {"goodput": goodput_data(goodput)}


def _search(config: RunConfig, machine: Machine, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from flm_megatron.planner.feasibility import require_candidates
    from flm_megatron.planner.report.text import NOTE, assumptions, search_data, search_text
    from flm_megatron.planner.search import search

    _check_shapes(config)
    texts, data = [], {}
    for stage in config.stages:
        result = search(stage, config.data.sequence_length, machine, args.gpus)
        require_candidates(stage, config.data.sequence_length, machine, args.gpus, result)
        texts.append(search_text(stage.name, result, machine, args.top))
        data[stage.name] = search_data(result, args.top)
    return "\n\n".join([*texts, assumptions(machine), NOTE]), data


def _budget(config: RunConfig, machine: Machine, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from flm_megatron.planner.growth_schedule import best_schedule
    from flm_megatron.planner.loss_law import chinchilla_law, read_laws
    from flm_megatron.planner.plan import HOUR, plan_run
    from flm_megatron.planner.report.text import schedule_text

    _check(config, args.gpus)
    stages = plan_run(config, machine, args.gpus).stages
    names = [stage.name for stage in stages]
    given = read_laws(args.laws, names) if args.laws else {}
    laws = [given.get(stage.name) or chinchilla_law(stage.parameters) for stage in stages]
    hours = [args.gpus / stage.tokens_per_s / HOUR for stage in stages]  # GPU-hours of a token
    schedule = best_schedule(laws, hours, args.budget)
    spent = [tokens * cost for tokens, cost in zip(schedule.tokens, hours, strict=True)]
    keys = ("tokens", "gpu_hours", "loss")
    rows = zip(schedule.tokens, spent, schedule.losses, strict=True)
    data = {
        "stages": {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, rows, strict=True)},
        "loss_from_scratch": schedule.loss_from_scratch,
        "laws": {name: vars(law) for name, law in zip(names, laws, strict=True)},
    }
    return schedule_text(names, schedule, spent), data


def _check(config: RunConfig, gpus: int) -> None:
    """The rules of the run file on that many processes."""
    from flm_megatron.config.rules import check
    from flm_megatron.errors import Mistakes

    try:
        check(config, gpus)
    except Mistakes as error:
        *others, last = error.lines
        raise Mistakes([*others, f"{last}; --search tries all layouts of {gpus} GPUs"]) from None


def _check_shapes(config: RunConfig) -> None:
    """The rules on what a search does not change."""
    from flm_megatron.config.rules import shape_violations
    from flm_megatron.errors import Mistakes

    if lines := shape_violations(config):
        raise Mistakes(lines)
