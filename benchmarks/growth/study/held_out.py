"""Holds what `flm advise` would have said of the study's grown runs against what they saved.

    python -m benchmarks.growth.study.held_out --data DATA --out OUT

After the study, with its folders. A run is predicted from other runs: laws fitted to the small stages and trunks from
scratch of the other seeds (`--pilot`), and what the same operator kept, once in the other seeds at the same budget,
once at other budgets, the nearest in tokens per parameter (of all seeds, so that branches of the run's own trunks are
among them). With D_s and D_l the tokens of its stages, r the ratio of FLOPs per token and D_0 the tokens from scratch
to the small stage's loss, by the laws, saved = 1 - (D_l + r D_s) / (D_l + kept D_0). Left out is what ends outside its
curve from scratch. Prints a table, and how many predictions are within NEAR of what was measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.growth.study.credit import SOURCE, equal_tokens, finished_study, kept_share, table
from benchmarks.growth.study.results import Line, lines
from benchmarks.growth.study.runs import Result, Study
from flm_megatron.planner.advice.token_credit import credit_table

NEAR = 0.05


@dataclass(frozen=True)
class Prediction:
    """One run: shares saved, measured and predicted from other seeds and from other budgets; none if not known."""

    run: Result
    measured: float
    by_seeds: float | None
    by_budgets: float | None


def predictions(study: Study) -> Iterator[Prediction]:
    """All runs whose saving is known, and whose arm has another seed."""
    found = lines(study.results(), study.sizes.flops("large"))
    for line in found:
        kept = [kept_share(study, line, saving) for saving in line.savings]
        elsewhere = _kept_at_other_budgets(study, line, found)
        for saving in line.savings:
            others = [share for share, each in zip(kept, line.savings, strict=True) if each is not saving]
            known = [share for share in others if share is not None]
            if saving.saved is None or not known:
                continue
            run, spent = saving.result, saving.result.flops / study.sizes.flops("large")
            seeds = tuple(each.result.seed for each in line.savings if each is not saving)
            equal = equal_tokens(study, line, seeds, run.small_tokens)
            by_seeds, by_budgets = (
                None if share is None else 1 - spent / (run.large_tokens + share * equal)
                for share in (fmean(known), elsewhere)
            )
            yield Prediction(run, saving.saved, by_seeds, by_budgets)


def _kept_at_other_budgets(study: Study, line: Line, found: Sequence[Line]) -> float | None:
    """The mean of what the line's operator kept at the nearest other budget."""
    others = [each for each in found if each.arm == line.arm and each.budget != line.budget]
    credits = credit_table(table(study, others), Path(SOURCE))
    if not credits.measured:
        return None
    return credits.for_growth(credits.measured[0].factors, line.budget)[0].interval().expected


def text(found: Sequence[Prediction]) -> str:
    """A table in Markdown, a line for each arm, growth point and budget, and the counts of near predictions."""
    of_line: dict[tuple[float, float, str], list[Prediction]] = defaultdict(list)
    for each in found:
        of_line[each.run.budget, each.run.grown_at, each.run.arm].append(each)
    rows = [
        "| tokens per parameter | grown at | arm | saved (seeds) | predicted from other seeds | from other budgets |",
        "|---|---|---|---|---|---|",
    ]
    for (budget, at, arm), own in sorted(of_line.items()):
        columns: list[list[float | None]] = [
            [p.measured for p in own],
            [p.by_seeds for p in own],
            [p.by_budgets for p in own],
        ]
        cells = (", ".join("-" if share is None else f"{share:.0%}" for share in column) for column in columns)
        rows.append(f"| {budget:g} | {at / budget:.0%} | {arm} | {' | '.join(cells)} |")
    counts = (
        f"From other {name}: {_near(found, name)} predictions are within {NEAR:.0%} of the cost from scratch."
        for name in ("seeds", "budgets")
    )
    return "\n".join([*rows, "", *counts])


def _near(found: Sequence[Prediction], name: str) -> str:
    errors = [abs(share - p.measured) for p in found if (share := getattr(p, f"by_{name}")) is not None]
    return f"{sum(error <= NEAR for error in errors)} of {len(errors)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    print(text(list(predictions(finished_study(parser)[0]))))


if __name__ == "__main__":
    main()
