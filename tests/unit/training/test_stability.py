"""Which steps are refused, when the run ends, and which replicas are mismatched."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from flm_megatron.checkpoint.manifest import SpikeState
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.rules import check
from flm_megatron.config.schema import StabilityConfig
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.training.hooks.replicas import checksum, mismatched_replicas
from flm_megatron.training.spikes import SpikeWatch

CONFIG = StabilityConfig(window_steps=16)


def watched(steps: int, config: StabilityConfig = CONFIG) -> SpikeWatch:
    """A watch that has seen `steps` steps of loss about 2 +- 0.1 and gradient norm about 1 +- 0.1."""
    watch, draw = SpikeWatch(config), random.Random(0)
    for _ in range(steps):
        watch.applied(2 + draw.gauss(0, 0.1), 1 + draw.gauss(0, 0.1))
    return watch


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_values_that_are_not_finite_are_refused_from_the_first_step(loss: float, norm: float) -> None:
    assert "is" in (SpikeWatch(CONFIG).reason(loss, norm) or "")


def test_outliers_above_are_refused_and_values_below_are_not() -> None:
    watch = watched(16)
    assert watch.reason(2.3, 1.3) is None and watch.reason(0.1, 0.1) is None
    assert (watch.reason(4.0, 1.0) or "").startswith("loss 4 is ")
    assert (watch.reason(2.0, 3.0) or "").startswith("grad_norm 3 is ")
    assert SpikeWatch(replace(CONFIG, sigmas=0)).reason(1e9, 1e9) is None


def test_no_outlier_is_known_before_half_the_window_is_seen() -> None:
    assert watched(7).reason(9.0, 9.0) is None
    assert watched(8).reason(9.0, 1.0) is not None


def test_equal_losses_do_not_make_the_next_one_an_outlier() -> None:
    watch = SpikeWatch(CONFIG)
    for _ in range(16):
        watch.applied(2.0, 1.0)
    assert watch.reason(2.001, 1.001) is None and watch.reason(2.1, 1.0) is not None


def test_refused_steps_in_a_row_end_the_run_with_what_was_seen() -> None:
    watch = watched(8)
    for step in (9, 10):
        watch.refused(step, "loss is nan", "samples 1 to 2", math.nan, 1.0)
    watch.applied(2.0, 1.0)
    watch.refused(12, "loss is nan", "samples 5 to 6", math.nan, 1.0)
    watch.refused(13, "loss is inf", "samples 7 to 8", math.inf, 1.0)
    with pytest.raises(
        FlmError, match=r"3 steps in a row.*step 12 \(samples 5 to 6\).*step 14.*grad_norm is nan"
    ) as error:
        watch.refused(14, "grad_norm is nan", "samples 9 to 10", 2.0, math.nan)
    assert error.value.status == 1 and watch.skipped == 5


def test_policy_stop_ends_at_the_first() -> None:
    with pytest.raises(FlmError, match="a step was refused"):
        SpikeWatch(replace(CONFIG, policy="stop")).refused(3, "loss is nan", "samples 1 to 2", math.nan, 1.0)


def test_a_watch_goes_on_from_its_saved_state() -> None:
    watch = watched(12)
    watch.refused(13, "loss is nan", "samples 1 to 2", math.nan, 1.0)
    again = SpikeWatch(CONFIG, SpikeState.model_validate(json.loads(json.dumps(watch.state().model_dump()))))
    assert again.state() == watch.state()
    assert again.reason(3.0, 1.0) == watch.reason(3.0, 1.0) is not None


@pytest.mark.parametrize(
    ("field", "value"), [("sigmas", -1), ("max_in_a_row", 0), ("window_steps", 2), ("embedding_gradient_shrink", 2)]
)
def test_values_out_of_range_are_one_line(field: str, value: float) -> None:
    run = {"data": {"sequence_length": 8}, "stages": [{"tokens": 64, "stability": {field: value}}]}
    with pytest.raises(RequestError, match=rf"stability\.{field} is {value}"):
        check(run_from_dict(run))


def test_the_copy_that_the_majority_disagrees_with_is_named() -> None:
    weight: tuple[str, tuple[int, ...]] = ("decoder.layers.mlp.linear_fc1.weight", (3, 0, 0))
    norm: tuple[str, tuple[int, ...]] = ("decoder.final_layernorm.weight", (0,))
    same = {weight: 5, norm: 7}
    assert mismatched_replicas([same, same, {weight: 5, norm: 8}, same]) == {2: norm}
    assert mismatched_replicas([same, {weight: 6, norm: 7}]) == {0: weight, 1: weight}
    assert mismatched_replicas([{weight: 5}, {norm: 7}]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_any_bit_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    for index in (0, 7, 14):
        for bit in (0, 9, 14):
            changed = tensor.clone()
            changed.view(bits).view(-1)[index] ^= 1 << bit
            assert checksum(changed) != checksum(tensor)
    assert checksum(tensor.flip(1)) != checksum(tensor) == checksum(tensor.clone())
