"""How the loss of one model size falls with tokens: L(D) = floor + scale x D^-exponent, given or fitted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from flm_megatron.config.yaml_text import parse_yaml, read_yaml
from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject

EXPONENTS = np.linspace(0.02, 1.0, 197)
FEWEST_POINTS = 5
Tokens = TypeVar("Tokens", float, np.ndarray)


@dataclass(frozen=True)
class LossLaw:
    """Loss in nats per token after `tokens` tokens from scratch."""

    floor: float
    scale: float
    exponent: float

    def loss(self, tokens: Tokens) -> Tokens:
        """Loss after `tokens` tokens."""
        return self.floor + self.scale * tokens**-self.exponent

    def tokens(self, loss: np.ndarray) -> np.ndarray:
        """Tokens until the loss is `loss`; infinite at and below the floor."""
        above = np.maximum(loss - self.floor, 0.0)
        with np.errstate(divide="ignore"):
            return (above / self.scale) ** (-1 / self.exponent)


def first_reached(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a measured curve (tokens or FLOPs, loss), in order, first comes down to `loss`, straight between points
    over the logarithm; none where it begins below or ends above."""
    if not curve or curve[0][1] < loss:
        return None
    for (x0, l0), (x1, l1) in pairwise(curve):
        if l1 <= loss <= l0 and l1 < l0:
            return x0 * (x1 / x0) ** ((l0 - loss) / (l0 - l1))
    return None


@dataclass(frozen=True)
class SizeLaw:
    """Loss of every size: L(N, D) = floor + size_scale x N^-size_exponent + scale x D^-exponent."""

    floor: float
    size_scale: float
    size_exponent: float
    scale: float
    exponent: float

    def at(self, parameters: float) -> LossLaw:
        """The law of one size."""
        return LossLaw(self.floor + self.size_scale * parameters**-self.size_exponent, self.scale, self.exponent)


HOFFMANN = SizeLaw(1.69, 406.4, 0.34, 410.7, 0.28)
"""Hoffmann et al., arXiv 2203.15556, approach 3."""
BESIROGLU = SizeLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
"""The fit of Besiroglu et al., arXiv 2404.10102, to the same runs."""


def chinchilla_law(parameters: float) -> LossLaw:
    """The general law of Hoffmann et al. for `parameters` parameters; another data mix has other constants."""
    return HOFFMANN.at(parameters)


def fit_law(tokens: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """Least squares over floor and scale for each exponent of a grid; points count by the logarithm of tokens, so that
    the many late ones do not drown the early ones.

    Raises:
        RequestError: too few points, or losses that do not fall.
    """
    if len(tokens) < FEWEST_POINTS:
        raise RequestError(f"{len(tokens)} points are too few to fit a loss law; at least {FEWEST_POINTS} are needed")
    x, y = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    weight = np.sqrt(np.gradient(np.log(x)))
    best: tuple[float, LossLaw] | None = None
    for exponent in EXPONENTS:
        columns = np.stack([np.ones_like(x), x**-exponent], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(columns * weight[:, None], y * weight, rcond=None)
        error = float((((columns @ [floor, scale]) - y) ** 2 * weight**2).sum())
        if floor >= 0 and scale > 0 and (best is None or error < best[0]):
            best = error, LossLaw(float(floor), float(scale), float(exponent))
    if best is None:
        raise RequestError("the losses do not fall as floor + scale x tokens^-exponent; leave the warm-up out")
    return best[1]


def read_law(value: Json, name: str, folder: Path) -> LossLaw:
    """A law from a mapping with floor, scale and exponent, or from the path of a metrics.jsonl, whose lines of the
    stage `name` (of all stages if none is called so) are fitted; the first tenth is taken for warm-up.

    Raises:
        RequestError: neither of the two, or a file that cannot be read or fitted.
    """
    if isinstance(value, dict) and set(value) == {"floor", "scale", "exponent"}:
        return LossLaw(**law_numbers(value, f"law of {name!r}"))
    if isinstance(value, str):
        return _fit_metrics(folder / value, name)
    raise RequestError(f"law of {name!r} has to be floor, scale and exponent, or the path of a metrics.jsonl")


def law_numbers(values: JsonObject, law: str) -> dict[str, float]:
    """The constants of a law by name: finite, the floor at least 0, the others above 0.

    Raises:
        RequestError: they are not; it begins with `law`.
    """
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (0 if name == "floor" else sys.float_info.min) <= value <= sys.float_info.max:
            *others, last = (other for other in values if other != "floor")
            raise RequestError(
                f"{law}: floor has to be at least 0, {', '.join(others)} and {last} above 0, not {name} {value!r:.40}"
            )
    return {name: float(value) for name, value in values.items()}


def read_laws(path: Path, stages: Sequence[str]) -> dict[str, LossLaw]:
    """Laws by stage name from a YAML file; paths in it are relative to it.

    Raises:
        RequestError: the file cannot be read, or names an unknown stage.
    """
    values = laws_document(path)
    if not isinstance(values, dict):
        raise RequestError(f"laws {path} have to be a mapping of stage names")
    unknown = sorted(set(values) - set(stages))
    if unknown:
        raise RequestError(f"{path}: unknown stage {unknown[0]!r}; the run has {', '.join(stages)}")
    return {name: read_law(value, name, path.parent) for name, value in values.items()}


def laws_document(path: Path) -> Json:
    """What a YAML file of laws holds. Raises RequestError if it cannot be read."""
    try:
        text = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read laws {path}: {' '.join(str(error).split())}") from None
    return parse_yaml(text, f"cannot read laws {path}")


def _fit_metrics(path: Path, name: str) -> LossLaw:
    from flm_megatron.training.metrics.events import StepEvent, read_events

    if not path.is_file():
        raise RequestError(f"law of {name!r}: no metrics file {path}")
    steps = read_events(path.parent, StepEvent)
    own = [step for step in steps if step.stage == name] or steps
    if not own:
        raise RequestError(f"law of {name!r}: {path} has no training losses")
    start = own[0].tokens - (own[1].tokens - own[0].tokens if len(own) > 1 else 0)
    kept = own[len(own) // 10 :]
    return fit_law([step.tokens - start for step in kept], [step.loss for step in kept])
