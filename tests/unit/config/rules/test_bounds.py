"""Bounds of the run file's numbers: the last value that is allowed, and the first that is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.config.rules.model import model_sizes_are_counts
from flm_megatron.config.rules.pipeline import divisors
from flm_megatron.config.rules.schedule import STABILITY_RULES, learning_rates_are_ordered
from flm_megatron.config.schema import LoraConfig, ModelConfig, OptimizerConfig, RunConfig, StabilityConfig, StageConfig


def stability(**fields: Any) -> StabilityConfig:
    """The section with these fields; its rules are not asked."""
    return replace(StabilityConfig(), **fields)


def broken(rules: Any, section: Any) -> bool:
    """Whether a section breaks any of its rules."""
    return any(rule(section) for rule in rules)


@pytest.mark.parametrize(
    ("field", "least", "largest"),
    [
        ("window_steps", 4, 1_000_000),
        ("max_in_a_row", 1, 1_000_000_000),
        ("new_level_steps", 0, 1_000_000_000),
        ("checksum_interval_steps", 0, 1_000_000_000),
    ],
)
def test_counts_of_the_spike_guard(field: str, least: int, largest: int) -> None:
    fine = [stability(**{field: value}) for value in (least, largest)]
    wrong = [stability(**{field: value}) for value in (least - 1, largest + 1)]
    assert [broken(STABILITY_RULES, each) for each in fine] == [False, False]
    assert [broken(STABILITY_RULES, each) for each in wrong] == [True, True]


@pytest.mark.parametrize(("field", "fine", "wrong"), [("sigmas", 0.0, -0.1), ("z_loss", 0.0, -1e-9)])
def test_factors_of_the_spike_guard(field: str, fine: float, wrong: float) -> None:
    assert not broken(STABILITY_RULES, stability(**{field: fine}))
    assert broken(STABILITY_RULES, stability(**{field: wrong}))


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_a_gradient_is_shrunk_to_a_share(factor: float) -> None:
    assert not broken(STABILITY_RULES, StabilityConfig(embedding_gradient_shrink=factor))
    for wrong in (-0.01, 1.01):
        assert broken(STABILITY_RULES, StabilityConfig(embedding_gradient_shrink=wrong))


def test_ranks_of_adapters() -> None:
    ranks = {
        rank: bool(model_sizes_are_counts(ModelConfig(lora=LoraConfig(rank=rank)))) for rank in (0, 1, 65536, 65537)
    }
    assert ranks == {0: True, 1: False, 65536: False, 65537: True}


@pytest.mark.parametrize(
    ("lr", "least", "fine"), [(1e-3, 0.0, True), (1e-3, 1e-3, True), (1e-3, 1.1e-3, False), (1e-3, -1e-9, False)]
)
def test_the_last_learning_rate_lies_between_zero_and_the_first(lr: float, least: float, fine: bool) -> None:
    run = RunConfig(stages=[StageConfig(optimizer=OptimizerConfig(lr=lr, min_lr=least))])
    assert bool(learning_rates_are_ordered(run, 0)) is not fine


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (7, [1, 7]), (12, [1, 2, 3, 4, 6, 12])])
def test_divisors(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected
