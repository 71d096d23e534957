"""Plan memory, time and cost of a run file's stages before asking for the machines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path, positive, processes, real, take_overrides

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig


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
    parser.add_argument(
        "--verify",
        action="store_true",
        help="rehearse a rank of every role too, and show its memory, arithmetic and transfers beside the plan; with "
        "--search of each layout that it shows",
    )
    add_json(parser)
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.paths import require_picture

    config = open_run(args.run_file, args.overrides)
    if args.plot is not None:
        require_picture(args.plot, "--plot")
    chosen = _search if args.search else _plan if args.budget is None else _budget
    text, data = chosen(config, args)
    print_json(data) if args.json else print(text)
    return 0


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """What all kinds of plan are told of stages and machine."""
    names = ("gpu", "gpus", "stage", "nodes_of", "hardware")
    return {name: getattr(args, name) for name in names}


def _plan(config: RunConfig, args: argparse.Namespace) -> tuple[str, Mapping[str, object]]:
    from flm_megatron.api.plan import plan

    planned = plan(config, **_machine(args), mtbf=args.mtbf, plot=args.plot, verify=args.verify)
    return str(planned), planned.to_dict()


def _search(config: RunConfig, args: argparse.Namespace) -> tuple[str, Mapping[str, object]]:
    from flm_megatron.api.plan import planned_on, rehearse_layouts, search_layouts
    from flm_megatron.planner.report.text import NOTE, assumptions, search_data, search_text

    results = search_layouts(config, **_machine(args))
    run, machine = planned_on(config, **_machine(args))
    texts = [search_text(name, result, machine, args.top) for name, result in results.items()]
    data = {name: search_data(result, args.top) for name, result in results.items()}
    if args.verify:
        from flm_megatron.planner.rehearsal.searched import layouts_data, layouts_text

        for name, layouts in rehearse_layouts(run, results, machine, args.top).items():
            texts.append(f"Stage {name}\n{layouts_text(layouts)}")
            data[name]["rehearsed"] = layouts_data(layouts)
    return "\n\n".join([*texts, assumptions(machine), NOTE]), data


def _budget(config: RunConfig, args: argparse.Namespace) -> tuple[str, Mapping[str, object]]:
    from flm_megatron.api.budget.plan_budget import plan_budget

    divided = plan_budget(config, args.budget, **_machine(args), laws=args.laws)
    return str(divided), divided.to_dict()
