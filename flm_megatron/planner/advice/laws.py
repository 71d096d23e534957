"""Where the loss laws of an advice come from: published, a file, or pilots of this project's own data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.advice.equivalence import Pair
from flm_megatron.planner.advice.size_law import fit_size_law
from flm_megatron.planner.loss_law import (
    BESIROGLU,
    HOFFMANN,
    LossLaw,
    SizeLaw,
    fit_law,
    law_numbers,
    laws_document,
    read_laws,
)
from flm_megatron.training.metrics.events import FILE, StepEvent, read_events

FEWEST_SIZES = 3
"""Sizes among pilots from which on one law is fitted to all."""
POINTS, RESAMPLES = 40, 20
Reading = Callable[[ModelConfig], LossLaw | None]
"""The law of a model, or none if it has none."""


@dataclass(frozen=True)
class Laws:
    """Readings of the data, each of which has laws: two published fits, or fits to resampled pilots."""

    source: str
    readings: tuple[Reading, ...]

    def pairs(self, small: ModelConfig, large: ModelConfig) -> list[Pair]:
        """The laws of two models under each reading; none where a reading lacks one of them."""
        found = [(reading(small), reading(large)) for reading in self.readings]
        return [Pair(one, other) for one, other in found if one and other]


@dataclass(frozen=True)
class Pilot:
    """A run from scratch: its model, and its loss by tokens, evenly over the logarithm of tokens."""

    model: ModelConfig
    tokens: np.ndarray
    losses: np.ndarray


def published_laws() -> Laws:
    """The fits of Hoffmann et al. and of Besiroglu et al.; other data have other constants."""
    source = "the fits of arXiv 2203.15556 and arXiv 2404.10102, of other data and of 70M to 16B parameters"
    return Laws(source, (partial(_at_size, HOFFMANN), partial(_at_size, BESIROGLU)))


def laws_of_file(path: Path, run: RunConfig) -> Laws:
    """Laws by stage as `flm plan --laws` reads them, or one law of all sizes with the five numbers of `SizeLaw`.

    Raises:
        RequestError: the file cannot be read or is neither.
    """
    names, values = {field.name for field in fields(SizeLaw)}, laws_document(path)
    if not isinstance(values, dict) or set(values) != names:
        found = read_laws(path, [stage.name for stage in run.stages])
        by_model = [(stage.model, found[stage.name]) for stage in run.stages if stage.name in found]
        return Laws(f"{path}, by stage", (partial(_of_model, by_model),))
    law = SizeLaw(**law_numbers(values, f"law of all sizes in {path}"))
    return Laws(f"{path}, one law of all sizes", (partial(_at_size, law),))


def laws_of_pilots(pilots: Sequence[Pilot]) -> Laws:
    """From three sizes on one law of all sizes, else one of each; fitted to all points, and to resamples of them.

    Raises:
        RequestError: there are too few points, or losses that do not fall.
    """
    draw = np.random.default_rng(0)
    sizes = len({parameter_count(pilot.model) for pilot in pilots})
    fit = _fit_all if sizes >= FEWEST_SIZES else _fit_each
    readings = [fit(pilots)]
    for _ in range(RESAMPLES):
        try:
            readings.append(fit([_resampled(pilot, draw) for pilot in pilots]))
        except RequestError:  # a resample may be too poor to fit, all points were not
            continue
    kind = "one law of all sizes" if sizes >= FEWEST_SIZES else "a law of each size"
    source = f"{kind}, fitted to {len(pilots)} pilots and to {len(readings) - 1} resamples of them"
    return Laws(source, tuple(readings))


def read_pilot(folder: Path, most_tokens: float = math.inf) -> Pilot:
    """The run from scratch in an output folder: its first stage up to `most_tokens`, without the first tenth of that,
    which is warm-up.

    Raises:
        RequestError: it is no run's output folder, did not begin from scratch, or has too few steps.
    """
    if not (folder / "run.yaml").is_file() or not (folder / FILE).is_file():
        raise RequestError(f"pilot {folder} is not a run's output folder: it has no run.yaml and {FILE}")
    run = load_run(folder / "run.yaml")
    if run.checkpoint.initial:
        raise RequestError(f"pilot {folder} did not begin from scratch but from {run.checkpoint.initial}")
    steps = [step for step in read_events(folder, StepEvent) if step.stage == run.stages[0].name]
    steps = [step for step in steps if step.tokens <= most_tokens]
    kept = steps[len(steps) // 10 :]
    tokens, losses = np.array([float(s.tokens) for s in kept]), np.array([s.loss for s in kept])
    tokens, losses = tokens[np.isfinite(losses)], losses[np.isfinite(losses)]
    if len(tokens) < POINTS:
        raise RequestError(f"pilot {folder} has {len(tokens)} losses after its warm-up; at least {POINTS} are needed")
    edges = np.searchsorted(tokens, np.geomspace(tokens[0], tokens[-1], POINTS + 1)[1:-1], side="right")
    groups = zip(np.split(tokens, edges), np.split(losses, edges), strict=True)
    means = np.array([(np.exp(np.log(t).mean()), loss.mean()) for t, loss in groups if len(t)])
    return Pilot(run.stages[0].model, means[:, 0], means[:, 1])


def _at_size(law: SizeLaw, model: ModelConfig) -> LossLaw:
    return law.at(parameter_count(model))


def _of_model(laws: Sequence[tuple[ModelConfig, LossLaw]], model: ModelConfig) -> LossLaw | None:
    return next((law for each, law in laws if _size(each) == _size(model)), None)


def _fit_all(pilots: Sequence[Pilot]) -> Reading:
    sizes = np.concatenate([np.full(len(pilot.tokens), float(parameter_count(pilot.model))) for pilot in pilots])
    tokens, losses = (np.concatenate([getattr(pilot, name) for pilot in pilots]) for name in ("tokens", "losses"))
    return partial(_at_size, fit_size_law(sizes, tokens, losses))


def _fit_each(pilots: Sequence[Pilot]) -> Reading:
    of_size: dict[tuple[int, int], list[Pilot]] = {}
    for pilot in pilots:
        of_size.setdefault(_size(pilot.model), []).append(pilot)
    return partial(_of_model, [(each[0].model, _fit_together(each)) for each in of_size.values()])


def _fit_together(pilots: Sequence[Pilot]) -> LossLaw:
    """One law of pilots of one size, in order of tokens."""
    tokens, losses = (np.concatenate([getattr(pilot, name) for pilot in pilots]) for name in ("tokens", "losses"))
    order = tokens.argsort()
    return fit_law(list(tokens[order]), list(losses[order]))


def _size(model: ModelConfig) -> tuple[int, int]:
    return model.num_layers, parameter_count(model)


def _resampled(pilot: Pilot, draw: np.random.Generator) -> Pilot:
    """As many points, drawn with replacement and without repeats, in order."""
    chosen = np.unique(draw.integers(0, len(pilot.tokens), len(pilot.tokens)))
    return Pilot(pilot.model, pilot.tokens[chosen], pilot.losses[chosen])
