"""Search learning rates, initial standard deviations and multipliers on a narrow model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.mup.stage import chosen_stage
from flm_megatron.cli.options.parser import layers, path, positive, real, seed, width

if TYPE_CHECKING:
    from flm_megatron.hyperparameters.search import Trial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm mup search`."""
    parser.add_argument("run_file", type=path, help="run file whose data, model and values the search starts from")
    parser.add_argument("--stage", help="stage of the run file; without it the first")
    parser.add_argument("--trials", type=positive, default=20, help="runs; the first takes the run file's own values")
    parser.add_argument("--steps", type=positive, default=100, help="training steps of each run")
    parser.add_argument("--width", type=width, help="hidden size of the narrow model, if not muP's base width")
    parser.add_argument("--layers", type=layers, help="layers, if not the model's own")
    parser.add_argument("--global-batch", type=positive, default=8, help="samples in a step")
    parser.add_argument("--spread", type=real(1.0), default=4.0, help="values are drawn up to this factor either way")
    parser.add_argument(
        "--vary",
        type=_values,
        action="append",
        metavar="NAME=V1,V2,...",
        help="instead of random draws try every combination of these values, such as lr=3e-3,6e-3; may be repeated",
    )
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the draws")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that train trials at the same time")
    parser.add_argument(
        "--out", type=path, help="file that gets each run as a line of JSON when it ends; those in it are not run again"
    )


def run(args: argparse.Namespace) -> int:
    """Print each trial and the values of the best; 1 if none is stable."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.hyperparameters.search import SearchSettings, best, search
    from flm_megatron.launch.preflight import resolve
    from flm_megatron.paths import require_file

    if args.out:
        require_file(args.out, "--out")
    run_config = resolve(open_run(args.run_file))
    settings = SearchSettings(
        trials=args.trials,
        steps=args.steps,
        width=args.width,
        layers=args.layers,
        global_batch=args.global_batch,
        spread=args.spread,
        seed=args.seed,
        grid=tuple(args.vary or ()),
        jobs=args.jobs,
    )
    known = _ended(args.out) if args.out and args.out.exists() else {}
    trials: list[Trial] = []
    for trial in search(run_config, chosen_stage(run_config, args), settings, known):
        trials.append(trial)
        values = " ".join(f"{name} {value:.3g}" for name, value in trial.values.items())
        state = "stable" if trial.stable else "unstable"
        print(f"trial {trial.number:3} loss {trial.loss:.4f} gradient norm rise {trial.rise:+.2f} {state}: {values}")
        if args.out and trial.key not in known:
            _append(args.out, asdict(trial))
    return _print_best(best(trials), next((trial for trial in trials if trial.number == 0), None))


def _print_best(found: Trial | None, first: Trial | None) -> int:
    """Print the best trial's values as they go into a run file; 1 if there is none."""
    from flm_megatron.hyperparameters.search import MODEL_VALUES

    if found is None:
        print("no trial is stable: the loss or the gradient norm is not finite, or the norm keeps rising")
        return 1
    compared = f" (trial 0: {first.loss:.4f})" if first else ""
    print(f"best: trial {found.number}, loss {found.loss:.4f}{compared}")
    for section in ("model", "optimizer"):
        values = [name for name in found.values if (name in MODEL_VALUES) == (section == "model")]
        if values:
            print(f"{section}:")
        for name in values:
            print(f"  {name}: {found.values[name]:.4g}")
    return 0


def _values(text: str) -> tuple[str, tuple[float, ...]]:
    """Name and values of one field to vary."""
    from flm_megatron.hyperparameters.search import DECAY, GRID_VALUES

    name, _, listed = text.partition("=")
    if name not in GRID_VALUES:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be varied: give one of {', '.join(GRID_VALUES)}")
    try:
        values = tuple(float(value) for value in listed.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=V1,V2,... with numbers") from None
    lowest = 0.0 if name == DECAY else sys.float_info.min
    if not all(lowest <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give finite numbers above 0 (weight_decay may be 0)")
    return name, values


def _ended(file: Path) -> dict[str, Trial]:
    """Trials of an earlier search by key; a line that was cut off, or that is older than keys, is passed over."""
    from flm_megatron.hyperparameters.search import Trial

    trials = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):
            continue
        trials[trial.key] = trial
    trials.pop("", None)
    return trials


def _append(path: Path, line: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
