"""Writes what the study's operators kept of the small model's tokens into the table of `flm advise`.

    python -m benchmarks.growth.study.credit --data DATA --out OUT [--table FILE]

After the study, with its folders. kept = token credit / (D_0 / D_s): D_s are the tokens of the small stage, D_0 those
after which the trunk from scratch of the same seed had the small stage's last loss. Both learn at their constant rate
there, so their training losses are compared, as means over a twentieth of the small stage's steps. Arms whose savings
are not known for all seeds, or that have one seed alone, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.results import Line, Saving, lines
from benchmarks.growth.study.runs import SCRATCH, Study, run_folder
from benchmarks.growth.study.sizes import Sizes
from flm_megatron.planner.advice.candidates import growth_factors
from flm_megatron.planner.advice.token_credit import FEWEST_SEEDS, TABLE, read_credits
from flm_megatron.planner.loss_law import first_reached
from flm_megatron.training.metrics.events import StepEvent, read_events

WINDOWS = 20
"""Means of training losses go over one part in so many of the small stage's steps."""
SOURCE = "benchmarks/growth/study.md"


def equal_tokens(small: Sequence[StepEvent], scratch: Sequence[StepEvent]) -> float | None:
    """Tokens after which `scratch` first had the mean loss of the last steps of `small`; none outside of it."""
    size = max(1, len(small) // WINDOWS)
    loss = fmean(step.loss for step in small[-size:])
    ends = range(size, len(scratch) + 1, size)
    curve = [(float(scratch[end - 1].tokens), fmean(step.loss for step in scratch[end - size : end])) for end in ends]
    return first_reached(curve, loss)


def table(study: Study, found: Sequence[Line]) -> dict[str, object]:
    """The rows of the table: one for each arm and budget, its seeds and growth points together."""
    kept: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in found:
        shares = [_kept(study, line, saving) for saving in line.savings]
        known = [share for share in shares if share is not None]
        if len(known) == len(shares) >= FEWEST_SEEDS:
            kept[line.arm, line.budget] += known
    rows = [
        {
            "operator": arm,
            "factors": growth_factors(study.sizes.model(ARMS[arm].small), study.sizes.model("large")),
            "growth": ARMS[arm].growth,
            "tokens_per_parameter": budget,
            "kept": [round(share, 4) for share in shares],
        }
        for (arm, budget), shares in sorted(kept.items())
    ]
    return {"source": SOURCE, "measured": rows}


def _kept(study: Study, line: Line, saving: Saving) -> float | None:
    seed = saving.result.seed
    grown, trunk = (
        read_events(run_folder(study.out, *of, seed), StepEvent) for of in ((line.arm, line.grown_at), (SCRATCH, 0.0))
    )
    equal = equal_tokens([step for step in grown if step.stage == "small"], trunk)
    return None if equal is None or saving.credit is None else saving.credit * saving.result.small_tokens / equal


def finished_study(parser: argparse.ArgumentParser) -> Study:
    """The study that the command line names, with its folders."""
    parser.add_argument("--data", type=Path, required=True, help="the study's data")
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    from flm_megatron.data.tokenizer import Tokenizer

    sizes = Sizes(args.hidden, args.layers, Tokenizer(str(args.data / "tokenizer.model")).vocab_size)
    return Study(args.out.resolve(), args.data.resolve(), sizes, (), 0)


def main() -> None:
    """Write the table, and check that it can be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="file to write")
    study = finished_study(parser)
    args = parser.parse_args()
    data = table(study, lines(study.results(), study.sizes.flops("large")))
    args.table.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{args.table}: {len(read_credits(args.table).measured)} rows")


if __name__ == "__main__":
    main()
