"""A machine's efficiencies from kernels that were timed on it, written as a hardware YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from flm_megatron.planner.cost.matmul import matmul_time
from flm_megatron.planner.machine import Machine

MATMUL = [share / 100 for share in range(20, 101)]
TILE_OVERHEAD = [float(terms) for terms in range(0, 1025, 32)]


@dataclass(frozen=True)
class TimedProduct:
    """A multiplication [rows, inner] x [inner, columns] and the seconds it took."""

    rows: int
    columns: int
    inner: int
    seconds: float


def fit_products(
    machine: Machine, precision: Literal["fp32", "bf16"], timed: Sequence[TimedProduct]
) -> tuple[float, float]:
    """`matmul` and `tile_overhead` that come nearest to the timed products, by the logarithm of their times."""

    def error(matmul: float, overhead: float) -> float:
        """Sum of squared log ratios of planned to measured seconds."""
        efficiency = replace(machine.efficiency, matmul=matmul, tile_overhead=overhead)
        trial = replace(machine, efficiency=efficiency)
        times = [(matmul_time(trial, precision, p.rows, p.columns, p.inner), p.seconds) for p in timed]
        return sum(math.log(planned / measured) ** 2 for planned, measured in times)

    return min(((matmul, overhead) for matmul in MATMUL for overhead in TILE_OVERHEAD), key=lambda pair: error(*pair))


def write_efficiency(path: Path, note: str, fields: Mapping[str, object] | None = None, **shares: float) -> None:
    """Write a hardware file for `flm plan --hardware` that changes these efficiencies; `note` says what they are of.

    `fields` are further fields of `Machine`, for a device that is not in the table.
    """
    values = {**(fields or {}), "efficiency": {name: round(share, 4) for name, share in shares.items()}}
    text = yaml.safe_dump(values, sort_keys=False)
    path.write_text("".join(f"# {line}\n" for line in note.splitlines()) + text, encoding="utf-8")
