"""The advice: what growth out of each smaller model is expected to save, and whether to grow at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.advice.candidates import Candidate, can_grow, candidates
from flm_megatron.planner.advice.equivalence import GrowthPoint, best_growth
from flm_megatron.planner.advice.laws import Laws
from flm_megatron.planner.advice.token_credit import CreditTable, OperatorCredit
from flm_megatron.training.metrics.flops import training_flops_per_token

LEAST_SAVING = 0.02
"""Share below which a saving is not worth the trouble."""
Verdict = Literal["grow", "do not grow", "not measured"]
CostPerToken = Callable[[ModelConfig], float | None]
"""What a token of a model costs, in any unit; none where the machine cannot train it."""


@dataclass(frozen=True)
class Option:
    """One small model: the bound by equality of losses and, if an operator that fits was measured on the dimensions
    that grow, what the best of them is expected to save; none where nothing is saved. `factor` is the ratio of
    parameters."""

    candidate: Candidate
    factor: float
    cost_ratio: float
    bound: GrowthPoint | None
    credit: OperatorCredit | None
    expected: GrowthPoint | None


@dataclass(frozen=True)
class Advice:
    """What to do with `tokens` from scratch of the run's last model, which cost `flops`.

    `best` is the option that the verdict is about: the one with the largest expected saving, or else the largest
    bound. `unit` is what savings are shares of.
    """

    verdict: Verdict
    tokens: float
    flops: float
    parameters: int
    unit: str
    laws: str
    credit_source: str
    best: Option | None
    options: tuple[Option, ...]

    @property
    def point(self) -> GrowthPoint | None:
        """When to grow, by the best option."""
        return None if self.best is None else self.best.expected or self.best.bound

    @property
    def growth(self) -> JsonObject | None:
        """The best option's `growth` block, where one was measured."""
        return dict(self.best.credit.growth) if self.best and self.best.credit else None


def advise_run(
    run: RunConfig, laws: Laws, credits: CreditTable, budget: float | None, cost: CostPerToken | None, unit: str
) -> Advice:
    """Advice on the last stage of `run`, for a `budget` in FLOPs (by default its model's and its tokens').

    Savings are shares of the cost from scratch, by `cost` (FLOPs by default).

    Raises:
        RequestError: no budget, a last model without a price, or no smaller model and no laws to compare.
    """
    large, length = run.stages[-1].model, run.data.sequence_length
    per_token = training_flops_per_token(large, length)
    tokens = budget / per_token if budget else float(run.stages[-1].tokens)
    if tokens <= 0:
        raise RequestError(f"stage {run.stages[-1].name!r} has no tokens: give --budget FLOPS, or its tokens")
    price = cost or (lambda model: training_flops_per_token(model, length))
    whole = price(large)
    if whole is None:
        raise RequestError(f"the model of stage {run.stages[-1].name!r} fits the machine under no layout: give more")
    found = [
        option
        for candidate in candidates(large, run.stages[:-1])
        if (option := _option(candidate, large, laws, credits, price, whole, tokens)) is not None
    ]
    if not found:
        raise RequestError(
            f"no smaller model has a law, or a layout, beside that of stage {run.stages[-1].name!r}: give laws or "
            "pilots of both sizes, or of three"
        )
    options = sorted(found, key=_rank, reverse=True)
    return Advice(
        _verdict(options[0]),
        tokens,
        tokens * per_token,
        parameter_count(large),
        unit,
        laws.source,
        credits.source,
        options[0],
        tuple(options),
    )


def _option(
    candidate: Candidate,
    large: ModelConfig,
    laws: Laws,
    credits: CreditTable,
    price: CostPerToken,
    whole: float,
    tokens: float,
) -> Option | None:
    """An option; none where its law or its price is not known. `whole` is the price of a token of `large`."""
    pairs = laws.pairs(candidate.model, large)
    cost = price(candidate.model) if pairs else None
    if cost is None:
        return None
    ratio = cost / whole
    parameters = parameter_count(large)
    measured = [
        row
        for row in credits.for_growth(candidate.factors, tokens / parameters)
        if can_grow(candidate.model, large, row.config())
    ]
    expected = [(row, best_growth(pairs, ratio, tokens, row.interval())) for row in measured]
    credit, point = max(expected, key=lambda each: each[1].saved if each[1] else 0.0, default=(None, None))
    factor = parameters / parameter_count(candidate.model)
    return Option(candidate, factor, ratio, best_growth(pairs, ratio, tokens), credit, point)


def _rank(option: Option) -> tuple[float, float]:
    """Expected saving first, then the bound; what was measured to save nothing comes last."""
    bound = option.bound.saved if option.bound else 0.0
    if option.credit is None:
        return 0.0, bound
    return (option.expected.saved, bound) if option.expected else (-1.0, bound)


def _verdict(best: Option) -> Verdict:
    if best.bound is None or best.bound.high < LEAST_SAVING:
        return "do not grow"
    if best.credit is None:
        return "not measured"
    pays = best.expected and best.expected.low > 0 and best.expected.saved >= LEAST_SAVING
    return "grow" if pays else "do not grow"
