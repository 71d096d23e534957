"""Writes what the study's operators kept of the small model's tokens into the table of `flm advise`.

    python -m benchmarks.growth.study.credit --data DATA --out OUT [--table FILE]

After the study, with its folders. kept = token credit / (D_0 / D_s): D_s are the tokens of the small stage, D_0 those
of the large model from scratch to the same loss, by the laws that `flm advise --pilot` fits to the small stage and to
the trunk from scratch of the same seed, up to the run's budget. What these laws get wrong of such curves is then the
same where it is measured and where it is applied. Arms whose savings are not known for all seeds, or that have one seed
alone, are left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.results import Line, Saving, lines
from benchmarks.growth.study.runs import SCRATCH, Study, run_folder
from benchmarks.growth.study.sizes import Sizes
from flm_megatron.planner.advice.candidates import growth_factors
from flm_megatron.planner.advice.laws import laws_of_pilots, read_pilot
from flm_megatron.planner.advice.token_credit import FEWEST_SEEDS, TABLE, read_credits

SOURCE = "benchmarks/growth/study.md"


@cache
def equal_tokens(study: Study, line: Line, seeds: tuple[int, ...], small_tokens: int) -> float:
    """Tokens from scratch to the loss of the small model after `small_tokens`, by laws fitted to pilots of `seeds`.

    The mean over the laws of resampled pilots.
    """
    budget = line.budget * study.sizes.parameters
    trunks = ((line.arm, line.grown_at), math.inf), ((SCRATCH, 0.0), budget)
    pilots = [read_pilot(run_folder(study.out, *of, seed), most) for seed in seeds for of, most in trunks]
    pairs = laws_of_pilots(pilots).pairs(study.sizes.model(ARMS[line.arm].small), study.sizes.model("large"))
    return fmean(float(pair.equal_tokens(np.array(float(small_tokens)))) for pair in pairs)


def table(study: Study, found: Sequence[Line]) -> dict[str, object]:
    """The rows of the table: one for each arm and budget, its seeds and growth points together."""
    kept: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in found:
        shares = [kept_share(study, line, saving) for saving in line.savings]
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


def kept_share(study: Study, line: Line, saving: Saving) -> float | None:
    """What one run kept; none where it is not known."""
    if saving.credit is None:
        return None
    run = saving.result
    return saving.credit * run.small_tokens / equal_tokens(study, line, (run.seed,), run.small_tokens)


def finished_study(parser: argparse.ArgumentParser) -> tuple[Study, argparse.Namespace]:
    """The study that the command line names, with its folders, and all arguments."""
    parser.add_argument("--data", type=Path, required=True, help="the study's data")
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    from flm_megatron.data.tokenizer import open_tokenizer

    sizes = Sizes(args.hidden, args.layers, open_tokenizer(str(args.data / "tokenizer.model")).vocab_size)
    return Study(args.out.resolve(), args.data.resolve(), sizes, (), 0), args


def main() -> None:
    """Write the table, and check that it can be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="file to write")
    study, args = finished_study(parser)
    data = table(study, lines(study.results(), study.sizes.flops("large")))
    args.table.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{args.table}: {len(read_credits(args.table).measured)} rows")


if __name__ == "__main__":
    main()
