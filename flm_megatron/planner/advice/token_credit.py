"""What operators were measured to keep of the small model's tokens: a table in a file, filled by a study.

    {"source": "where the figures come from",
     "measured": [{"operator": "depth: copy", "factors": {"layers": 2}, "tokens_per_parameter": 5,
                   "growth": {"layers": "copy", "layer_selection": "stack"}, "kept": [0.91, 0.88, 0.94]}]}

`kept` has one number for each seed: the token credit of the grown run, (tokens of T_eq - tokens of the large stage) /
tokens of the small stage, over D_0 / D_s, the credit by equality of losses at the same point (`equivalence`), both from
the same runs. `factors` says by what each dimension that grew became larger; `growth` is the block of the run file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from pydantic import ValidationError

from flm_megatron.config.messages import explain
from flm_megatron.config.schema import GrowthConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject, parse_json
from flm_megatron.planner.advice.equivalence import Kept

TABLE = Path(__file__).with_name("token_credit.json")
DIMENSIONS = {"hidden", "ffn", "heads", "layers"}
FEWEST_SEEDS = 2
LARGEST = 1e6
"""Factor that stands for growth out of no layers."""


@dataclass(frozen=True)
class OperatorCredit:
    """What one way to grow kept, by seed, at a number of tokens per parameter."""

    operator: str
    factors: Mapping[str, float]
    growth: JsonObject
    tokens_per_parameter: float
    kept: tuple[float, ...]

    def interval(self) -> Kept:
        """The mean over seeds, and twice their standard deviation on either side."""
        mean, spread = fmean(self.kept), 2 * stdev(self.kept)
        return Kept(mean, mean - spread, mean + spread)

    def config(self) -> GrowthConfig:
        """The growth block as a run file has it. Raises ValidationError if a run file does not take it."""
        return GrowthConfig(**self.growth)


@dataclass(frozen=True)
class CreditTable:
    """All that was measured, and where."""

    source: str
    measured: tuple[OperatorCredit, ...]

    def for_growth(self, factors: Mapping[str, float], tokens_per_parameter: float) -> list[OperatorCredit]:
        """The operators that were measured on these dimensions, by the nearest factors, at the nearest tokens per
        parameter.

        What an operator kept elsewhere is not set against it: copies of one layer keep more than those of two, shorter
        runs more in width and less in depth.
        """

        def from_factors(row: OperatorCredit) -> float:
            """How far a row's factors are, in logarithms."""
            return sum(abs(math.log(min(factors[name], LARGEST) / by)) for name, by in row.factors.items())

        def from_length(row: OperatorCredit) -> float:
            """How far a row's tokens per parameter are, in the logarithm."""
            return abs(math.log(row.tokens_per_parameter / tokens_per_parameter))

        rows = _nearest([row for row in self.measured if set(row.factors) == set(factors)], from_factors)
        return _nearest(rows, from_length)


def _nearest(rows: Sequence[OperatorCredit], distance: Callable[[OperatorCredit], float]) -> list[OperatorCredit]:
    least = min(map(distance, rows), default=0.0)
    return [row for row in rows if math.isclose(distance(row), least, abs_tol=1e-9)]


def read_credits(path: Path = TABLE) -> CreditTable:
    """The table in a file; that of the program by default.

    Raises:
        RequestError: the file cannot be read, or is no such table.
    """
    try:
        data = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"cannot read token credit {path}: {error.strerror}") from None
    return credit_table(data, path)


def credit_table(data: Json, path: Path) -> CreditTable:
    """The table in a parsed file; `path` names it in errors. Raises RequestError if it is no such table."""
    if not isinstance(data, dict) or not isinstance(data.get("measured"), list):
        raise RequestError(f"{path} is no table of token credit: it has no list `measured`")
    return CreditTable(str(data.get("source", path)), tuple(_row(row, path) for row in data["measured"]))


def _row(data: Json, path: Path) -> OperatorCredit:
    if not isinstance(data, dict):
        raise RequestError(f"{path}: a row of token credit is {data!r:.40}, not an object")
    try:
        row = OperatorCredit(
            str(data["operator"]),
            {str(name): float(by) for name, by in data["factors"].items()},
            dict(data["growth"]),
            float(data["tokens_per_parameter"]),
            tuple(float(kept) for kept in data["kept"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: a row of token credit lacks or has a wrong {error}") from None
    try:
        row.config()
    except ValidationError as error:
        mistake = explain(error, of=("stages", "0", "growth"))[0]
        raise RequestError(f"{path}: {row.operator!r} has a growth block that no run file takes: {mistake}") from None
    numbers: Sequence[float] = (row.tokens_per_parameter, *row.kept, *row.factors.values())
    if len(row.kept) < FEWEST_SEEDS or not all(map(math.isfinite, numbers)) or row.tokens_per_parameter <= 0:
        raise RequestError(f"{path}: {row.operator!r} needs finite numbers of at least {FEWEST_SEEDS} seeds in `kept`")
    if not row.factors or set(row.factors) - DIMENSIONS or min(row.factors.values()) <= 1:
        raise RequestError(
            f"{path}: {row.operator!r} needs `factors`, numbers above 1, of {', '.join(sorted(DIMENSIONS))}"
        )
    return row
