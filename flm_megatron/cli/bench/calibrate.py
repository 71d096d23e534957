"""`flm bench --calibrate`: time products and copies on this device for the planner."""

from __future__ import annotations

import argparse

from flm_megatron.errors import RequestError
from flm_megatron.paths import require_file


def calibrate(args: argparse.Namespace) -> int:
    """Measure, write the file and print it; returns 0.

    Raises:
        RequestError: options beside it are of the measurement of a stage.
    """
    from flm_megatron.benchmarking.calibrate import calibrate as measure

    for name in ("run_file", "stage", "layers", "layouts", "compare", "out", "json"):
        if getattr(args, name):
            shown = "a run file" if name == "run_file" else f"--{name}"
            raise RequestError(f"--calibrate measures this device alone: leave out {shown}")
    if args.overrides:
        raise RequestError(f"--calibrate has no run file to override: leave out {' '.join(args.overrides)}")
    require_file(args.calibrate, "--calibrate")
    print(measure(args.calibrate))
    return 0
