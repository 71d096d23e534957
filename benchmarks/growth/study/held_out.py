"""Holds what `flm advise` would have said of the study's grown runs against what they saved.

    python -m benchmarks.growth.study.held_out --data DATA --out OUT

After the study, with its folders. A run is predicted from what it has no part in: laws fitted to the small stages and
trunks from scratch of the other seeds (`--pilot`), and the share kept that was measured for the same operator at other
budgets, the nearest in tokens per parameter. With D_s and D_l the tokens of its stages, r the ratio of FLOPs per token
and D_0 the tokens from scratch to the small stage's loss, by the laws, saved = 1 - (D_l + r D_s) / (D_l + kept D_0).
Runs of arms that were measured at one budget alone are left out, as are those that end outside their curve from
scratch. Prints a table, and how many predictions are within NEAR of what was measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.credit import SOURCE, finished_study, table
from benchmarks.growth.study.results import Line, lines
from benchmarks.growth.study.runs import SCRATCH, Result, Study, run_folder
from flm_megatron.planner.advice.laws import laws_of_pilots, read_pilot
from flm_megatron.planner.advice.token_credit import OperatorCredit, credit_table

NEAR = 0.05


@dataclass(frozen=True)
class Prediction:
    """One run: shares saved, predicted and measured."""

    run: Result
    predicted: float
    measured: float

    @property
    def near(self) -> bool:
        """Whether the prediction is good enough."""
        return abs(self.predicted - self.measured) <= NEAR


def predictions(study: Study) -> Iterator[Prediction]:
    """A prediction for every run that has one."""
    found = lines(study.results(), study.sizes.flops("large"))

    @cache
    def equal_tokens(arm: str, grown_at: float, without: int, tokens: int) -> float:
        """D_0 by the laws of the other seeds' pilots, as the mean over their resamples."""
        seeds = {r.seed for r in study.results() if (r.arm, r.grown_at) == (arm, grown_at)} - {without}
        of = (arm, grown_at), (SCRATCH, 0.0)
        pilots = [read_pilot(run_folder(study.out, *run, seed)) for seed in sorted(seeds) for run in of]
        sizes = study.sizes.model(ARMS[arm].small), study.sizes.model("large")
        pairs = laws_of_pilots(pilots).pairs(*sizes)
        return fmean(float(pair.equal_tokens(np.array(float(tokens)))) for pair in pairs)

    for line in found:
        row = _nearest_row(study, line, found)
        for saving in line.savings:
            if row is None or saving.saved is None or len(line.savings) == 1:
                continue
            run = saving.result
            equal = equal_tokens(line.arm, line.grown_at, run.seed, run.small_tokens)
            spent = run.flops / study.sizes.flops("large")
            yield Prediction(run, 1 - spent / (run.large_tokens + row.interval().expected * equal), saving.saved)


def _nearest_row(study: Study, line: Line, found: Sequence[Line]) -> OperatorCredit | None:
    """What the line's operator kept at the nearest other budget."""
    others = [each for each in found if each.arm == line.arm and each.budget != line.budget]
    credits = credit_table(table(study, others), Path(SOURCE))
    return next(iter(credits.for_growth(credits.measured[0].factors, line.budget)), None) if credits.measured else None


def text(found: Sequence[Prediction]) -> str:
    """A table in Markdown, a line for each arm, growth point and budget, and the count of near predictions."""
    of_line: dict[tuple[float, float, str], list[Prediction]] = defaultdict(list)
    for each in found:
        of_line[each.run.budget, each.run.grown_at, each.run.arm].append(each)
    rows = ["| tokens per parameter | grown at | arm | predicted (seeds) | saved (seeds) | within 5 points |"]
    rows.append("|---|---|---|---|---|---|")
    for (budget, at, arm), own in sorted(of_line.items()):
        predicted, saved = (
            ", ".join(f"{share:.0%}" for share in shares)
            for shares in ([each.predicted for each in own], [each.measured for each in own])
        )
        near = sum(each.near for each in own)
        rows.append(f"| {budget:g} | {at / budget:.0%} | {arm} | {predicted} | {saved} | {near} of {len(own)} |")
    near = sum(each.near for each in found)
    return "\n".join([*rows, "", f"{near} of {len(found)} predictions are within 5 points of what was saved."])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    print(text(list(predictions(finished_study(parser)))))


if __name__ == "__main__":
    main()
