"""Search learning rates, initial standard deviations and multipliers on a narrow model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.mup.stage import chosen_stage
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import layers, path, positive, real, seed, width

if TYPE_CHECKING:
    from flm_megatron.hyperparameters.search import Trial

BEGINNING = '{"number": '
"""What every line of results begins with."""


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
    add_json(parser)
    parser.add_argument(
        "--out", type=path, help="file that gets each run as a line of JSON when it ends; those in it are not run again"
    )


def run(args: argparse.Namespace) -> int:
    """Print each trial and the values of the best; returns 1 if none is stable."""
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.hyperparameters.search import SearchSettings, best, search
    from flm_megatron.launch.preflight import resolve
    from flm_megatron.paths import require_file

    if args.out:
        require_file(args.out, "--out")
    if args.vary:
        _refuse_draws(args)
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
        line = f"trial {trial.number:3} loss {trial.loss:.4f} gradient norm rise {trial.rise:+.2f} {state}: {values}"
        print(line, flush=True, file=sys.stderr if args.json else sys.stdout)
        if args.out and trial.key not in known:
            _append(args.out, asdict(trial))
    if args.json:
        found = best(trials)
        print_json({"trials": [asdict(trial) for trial in trials], "best": None if found is None else found.number})
        return 0 if found else 1
    return _print_best(trials)


def _refuse_draws(args: argparse.Namespace) -> None:
    """Raise RequestError if options of random draws were given beside a grid."""
    from flm_megatron.errors import RequestError
    from flm_megatron.hyperparameters.search import SearchSettings

    for name in ("trials", "spread", "seed"):
        if getattr(args, name) != getattr(SearchSettings, name):
            raise RequestError(f"--{name} is for random draws, and --vary tries every combination: give one of the two")


def _print_best(trials: Sequence[Trial]) -> int:
    """Print the best trial's values as they go into a run file, and an unstable one that is lower; 1 if none is
    stable."""
    from flm_megatron.hyperparameters.search import LARGEST_RISE, MODEL_VALUES, best, lower_but_unstable

    found, unstable = best(trials), lower_but_unstable(trials)
    if found is None:
        print("no trial is stable: the loss or the gradient norm is not finite, or the norm keeps rising")
    else:
        own = next(trial for trial in trials if trial.number == 0)
        print(f"best: trial {found.number}, loss {found.loss:.4f} (trial 0: {own.loss:.4f})")
        for section in ("model", "optimizer"):
            values = [name for name in found.values if (name in MODEL_VALUES) == (section == "model")]
            if values:
                print(f"{section}:")
            for name in values:
                print(f"  {name}: {found.values[name]:.4g}")
    if unstable:
        print(
            f"# unstable, but lower: trial {unstable.number}, loss {unstable.loss:.4f}, whose gradient norm rises as "
            f"step^{unstable.rise:.2f} (stable is up to {LARGEST_RISE}). Norms also rise in short runs whose loss "
            "falls fast, most of all from small deviations: try its values with more --steps"
        )
    return 0 if found else 1


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
    lowest = 0.0 if name in (DECAY, "min_lr") else sys.float_info.min
    if not all(lowest <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give finite numbers above 0 (weight_decay and min_lr may be 0)")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r}: give each value once")
    return name, values


def _ended(file: Path) -> dict[str, Trial]:
    """Trials of an earlier search by key; a line that was cut off, or that is older than keys, is passed over.

    Raises:
        RequestError: the file holds something else.
    """
    from flm_megatron.errors import RequestError
    from flm_megatron.hyperparameters.search import Trial

    trials = {}
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if lines and not any(line.startswith(BEGINNING) for line in lines):
        raise RequestError(f"--out {file} holds something else than trials of `flm mup search`: give another file")
    for line in lines:
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):
            continue
        trials[trial.key] = trial
    trials.pop("", None)
    return trials


def _append(path: Path, line: dict[str, object]) -> None:
    """Add a line of JSON, on a line of its own even after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(line) + "\n")
