"""Check the maximal-update parametrization, and search hyperparameters for it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import layers, path, positive, real, seed, width

if TYPE_CHECKING:
    from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm mup coord-check` and `flm mup search`."""
    commands = parser.add_subparsers(dest="mup_command", required=True, metavar="COMMAND")
    _add_check(commands)
    _add_search(commands)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "coord-check",
        help="sizes of activations and updates against width; exit status 1 if they do not follow muP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument(
        "run_file", type=path, nargs="?", help="take the model from this run file, not a small one of its own"
    )
    check.add_argument("--stage", help="stage of the run file; without it the first")
    check.add_argument(
        "--widths", type=width, nargs="+", default=[64, 128, 256, 512], help="the first is the base width"
    )
    check.add_argument("--layers", type=layers, help="layers, if not the model's own")
    check.add_argument("--steps", type=positive, default=3, help="training steps before updates are measured")
    check.add_argument("--seeds", type=positive, default=4, help="runs of each width, averaged")
    check.add_argument("--lr", type=real(0.0, above=True), default=2e-3, help="learning rate at the base width")
    check.add_argument("--tolerance", type=real(0.0), default=0.2, help="largest deviation of a power of the width")
    check.add_argument("--plot", type=path, default=Path("coord-check.png"), help="file of the plot")


def _add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    search = commands.add_parser(
        "search",
        help="random search of learning rates, initial standard deviations and multipliers on a narrow model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    search.add_argument("run_file", type=path, help="run file whose data, model and values the search starts from")
    search.add_argument("--stage", help="stage of the run file; without it the first")
    search.add_argument("--trials", type=positive, default=20, help="runs; the first takes the run file's own values")
    search.add_argument("--steps", type=positive, default=100, help="training steps of each run")
    search.add_argument("--width", type=width, help="hidden size of the narrow model, if not muP's base width")
    search.add_argument("--layers", type=layers, help="layers, if not the model's own")
    search.add_argument("--global-batch", type=positive, default=8, help="samples in a step")
    search.add_argument("--spread", type=real(1.0), default=4.0, help="values are drawn up to this factor either way")
    search.add_argument("--seed", type=seed, default=1234, help="seed of the draws")
    search.add_argument("--out", type=path, help="file that gets each run as a line of JSON when it ends")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    return _search(args) if args.mup_command == "search" else _check(args)


def _check(args: argparse.Namespace) -> int:
    """Print the tables, draw the plot; 1 if muP is broken."""
    from flm_megatron.hyperparameters.coordinate_check import CheckSettings, coordinate_check
    from flm_megatron.hyperparameters.coordinate_report import plot, table
    from flm_megatron.paths import require_picture

    require_picture(args.plot, "--plot")
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


def _search(args: argparse.Namespace) -> int:
    """Print each trial and the values of the best; 1 if none is stable."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.hyperparameters.search import MODEL_VALUES, SearchSettings, best, search
    from flm_megatron.launch.preflight import resolve
    from flm_megatron.paths import require_file

    if args.out:
        require_file(args.out, "--out")
    run_config = resolve(open_run(args.run_file))
    settings = SearchSettings(
        args.trials, args.steps, args.width, args.layers, args.global_batch, args.spread, args.seed
    )
    trials = []
    for trial in search(run_config, _stage(run_config, args), settings):
        trials.append(trial)
        values = " ".join(f"{name} {value:.3g}" for name, value in trial.values.items())
        state = "stable" if trial.stable else "unstable"
        print(f"trial {trial.number:3} loss {trial.loss:.4f} gradient norm rise {trial.rise:+.2f} {state}: {values}")
        if args.out:
            _append(args.out, asdict(trial))
    found = best(trials)
    if found is None:
        print("no trial is stable: the loss or the gradient norm is not finite, or the norm keeps rising")
        return 1
    print(f"best: trial {found.number}, loss {found.loss:.4f} (the run file's own values: {trials[0].loss:.4f})")
    for section in ("model", "optimizer"):
        print(f"{section}:")
        for name, value in found.values.items():
            if (name in MODEL_VALUES) == (section == "model"):
                print(f"  {name}: {value:.4g}")
    return 0


def _append(path: Path, line: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _stage(run_config: RunConfig, args: argparse.Namespace) -> StageConfig:
    """The stage named in the arguments, or the first."""
    from flm_megatron.config.stage_names import stage_index
    from flm_megatron.errors import RequestError

    if not run_config.stages:
        raise RequestError(f"{args.run_file} has no stages")
    return run_config.stages[0 if args.stage is None else stage_index(run_config, args.stage)]


def _model(args: argparse.Namespace) -> ModelConfig:
    """The model of the run file's stage, or the check's own; a small vocabulary does, since no width enters it."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.hyperparameters.coordinate_check import DEFAULT_MODEL

    if args.run_file is None:
        return replace(DEFAULT_MODEL, num_layers=args.layers or DEFAULT_MODEL.num_layers)
    model = _stage(open_run(args.run_file), args).model
    return replace(model, num_layers=args.layers or model.num_layers, vocab_size=DEFAULT_MODEL.vocab_size)
