"""Search learning rates, initial standard deviations and multipliers on a narrow model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from flm_megatron.cli.mup.stage import chosen_stage
from flm_megatron.cli.options.parser import layers, path, positive, real, seed, width


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
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the draws")
    parser.add_argument("--out", type=path, help="file that gets each run as a line of JSON when it ends")


def run(args: argparse.Namespace) -> int:
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
    for trial in search(run_config, chosen_stage(run_config, args), settings):
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
