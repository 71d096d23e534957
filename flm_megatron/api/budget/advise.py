"""Advice on whether, when and how to grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flm_megatron.api.plan import planned_on
from flm_megatron.api.values import require_above_zero
from flm_megatron.config.rules import shape_violations
from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.paths import FilePath, given_path
from flm_megatron.planner.advice.advice import Advice, CostPerToken, advise_run
from flm_megatron.planner.advice.laws import Laws, laws_of_file, laws_of_pilots, published_laws, read_pilot
from flm_megatron.planner.advice.report import advice_data, advice_text
from flm_megatron.planner.advice.token_credit import TABLE, read_credits
from flm_megatron.planner.chosen_stages import with_vocabulary
from flm_megatron.planner.search import search


@dataclass(frozen=True)
class GrowthAdvice(Advice):
    """Whether to grow, out of which model, when, and what that saves. `str(advice)` is the report of `flm advise`,
    `to_dict()` that of `--json`."""

    def __str__(self) -> str:
        """The report."""
        return advice_text(self)

    def to_dict(self) -> dict[str, object]:
        """Plain data: tokens, FLOPs, shares of the cost from scratch."""
        return advice_data(self)


def advise(
    run: RunConfig,
    *,
    pilots: Sequence[FilePath] = (),
    laws: FilePath | None = None,
    credit: FilePath | None = None,
    budget: float | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    nodes_of: int | None = None,
    hardware: FilePath | None = None,
) -> GrowthAdvice:
    """Advise on growing into the last model of `run`, trained on its tokens, or on what `budget` FLOPs give.

    >>> from flm_megatron import load_run
    >>> advice = advise(load_run("run.yaml"), budget=1e13)
    >>> advice.verdict
    'do not grow'

    Args:
        run: as `load_run` gives it; models of its other stages are candidates to grow out of, beside divided ones.
        pilots: output folders of runs from scratch, to whose losses laws are fitted: of both sizes, or of at least
            three.
        laws: YAML file of loss laws by stage, or of one law of all sizes; without it and pilots the published fits.
        credit: JSON table of what operators keep; that of the program by default.
        budget: FLOPs from scratch.
        gpu, gpus, nodes_of, hardware: as with `plan`: then savings are shares of GPU-hours, each model under its best
            layout.

    Raises:
        RequestError: the run file breaks a rule, laws, pilots or table cannot be used, or nothing can be compared.
    """
    require_above_zero("budget", budget)
    run = with_vocabulary(run)
    if lines := shape_violations(run):
        raise Mistakes(lines)
    table = read_credits(TABLE if credit is None else given_path(credit, "credit"))
    cost, unit = _cost(run, gpu, gpus, nodes_of, hardware)
    advice = advise_run(run, _laws(run, pilots, laws), table, budget, cost, unit)
    return GrowthAdvice(**vars(advice))


def _laws(run: RunConfig, pilots: Sequence[FilePath], laws: FilePath | None) -> Laws:
    if laws is not None and pilots:
        raise RequestError("laws and pilots: give one of them, for pilots are what laws are fitted to")
    if laws is not None:
        return laws_of_file(given_path(laws, "laws"), run)
    return laws_of_pilots([read_pilot(given_path(each, "pilot")) for each in pilots]) if pilots else published_laws()


def _cost(
    run: RunConfig, gpu: str | None, gpus: int | None, nodes_of: int | None, hardware: FilePath | None
) -> tuple[CostPerToken | None, str]:
    """GPU-seconds of a token under the best layout of each model, if a machine is given."""
    if gpu is None or gpus is None:
        if gpu is not None or gpus is not None:
            raise RequestError("gpu and gpus: give both, or neither")
        if nodes_of is not None or hardware is not None:
            raise RequestError("nodes_of and hardware are of a machine: give gpu and gpus too, or leave them out")
        return None, "FLOPs"
    run, machine = planned_on(run, gpu, gpus, None, nodes_of, hardware)
    last, length = run.stages[-1], run.data.sequence_length

    def price(model: ModelConfig) -> float | None:
        """GPU-seconds of a token; none where no layout fits."""
        found = search(replace(last, model=model), length, machine, gpus).candidates
        return 1 / found[0].tokens_per_s_per_device if found else None

    return price, f"GPU-hours on {gpus} {gpu}"
