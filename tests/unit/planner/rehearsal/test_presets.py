"""Presets under layouts that turn everything on or off, and published rows, as `benchmarks.planner.verify` has them."""

from __future__ import annotations

import pytest

from benchmarks.planner.rows import time_rows
from benchmarks.planner.verify import MOST, Case, cases, verify
from flm_megatron.config.presets import preset_names

FOUND, LEFT_OUT = cases()


def test_every_preset_and_every_row_is_verified_or_left_out_with_a_reason() -> None:
    names = [name for case in FOUND for name in case.names]
    assert set(preset_names()) <= set(names)
    left_out = [line.split(":")[0] for line in LEFT_OUT]
    assert sorted(row.name for row in time_rows()) == sorted(
        [*left_out, *(name for name in names if name in {row.name for row in time_rows()})]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{case.names[0]}: {case.layout()}") for case in FOUND if "layers" in case.names[0]]
)
def test_presets_do_what_is_planned(case: Case) -> None:
    for check in verify(case):
        assert not check.differing_flops and not check.differing_traffic, check
        assert abs(check.difference) < MOST, check
