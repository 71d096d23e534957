"""Epsilon relative to the gradients: weights with small gradients learn at any size of the model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.config.schema import LoraConfig, ModelConfig, OptimizerConfig, StageConfig
from flm_megatron.model.parameters import parameter_count
from flm_megatron.optim.adamw import AdamW
from flm_megatron.optim.epsilon import set_relative_epsilon
from flm_megatron.training.frozen_weights import frozen_units, trained_count

LR, COUNT = 1e-3, 4096
TYPICAL = 0.2 / 1e12**0.5
"""Size of a gradient of 1e12 parameters whose norm is 0.2."""
SHARES = [0.1, 0.01]
"""Gradients of the first entries, as shares of the typical one."""
OPTIONS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0}


def gradients(step: int, scale: float = 1.0) -> torch.Tensor:
    """Gradients [COUNT] of a model of 1e12 parameters."""
    drawn = torch.randn(COUNT, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    drawn[: len(SHARES)] = torch.tensor(SHARES)
    return drawn * TYPICAL * scale


def trained(options: OptimizerConfig, steps: int, scale: float = 1.0) -> tuple[torch.Tensor, float]:
    """How far our AdamW moves each entry in fp32, in learning rates, and the last epsilon."""
    param = torch.nn.Parameter(torch.zeros(COUNT))
    optimizer = AdamW([param], eps=options.eps, **OPTIONS)
    for step in range(steps):
        param.grad = gradients(step, scale).float()
        set_relative_epsilon(cast(Any, optimizer), options, float(param.grad.double().norm()), COUNT)
        optimizer.step()
    return -param.detach() / LR, optimizer.param_groups[0]["eps"]


def expected(eps: float | None, steps: int) -> torch.Tensor:
    """The same by torch's AdamW in float64; without `eps` it is a thousandth of each step's root mean square."""
    param = torch.nn.Parameter(torch.zeros(COUNT, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param], **OPTIONS)
    for step in range(steps):
        param.grad = gradients(step)
        optimizer.param_groups[0]["eps"] = eps or 1e-3 * float(param.grad.square().mean().sqrt())
        optimizer.step()
    return -param.detach() / LR


@pytest.mark.parametrize(
    ("options", "eps", "moved"),
    [(OptimizerConfig(), 1e-8, [0.667, 0.167]), (OptimizerConfig(eps_relative=1e-3), None, [0.99, 0.91])],
    ids=["eps", "eps_relative"],
)
def test_small_gradients_of_a_large_model(options: OptimizerConfig, eps: float | None, moved: list[float]) -> None:
    found, _ = trained(options, steps=1)
    assert found[: len(SHARES)].tolist() == pytest.approx(moved, abs=2e-3)
    found, _ = trained(options, steps=8)
    assert torch.allclose(found.double(), expected(eps, steps=8), rtol=1e-4, atol=1e-4)


def test_updates_do_not_depend_on_the_scale_of_the_gradients() -> None:
    for options, invariant in ((OptimizerConfig(eps_relative=1e-3), True), (OptimizerConfig(), False)):
        large, small = (trained(options, steps=8, scale=scale)[0] for scale in (1.0, 1e-4))
        assert torch.allclose(large, small, rtol=1e-4, atol=1e-4) is invariant


def test_clipped_gradients_count_and_their_absence_does_not_divide_by_zero() -> None:
    options = OptimizerConfig(eps_relative=0.5, clip_grad=1e-6)
    assert trained(options, 1)[1] == pytest.approx(0.5 * 1e-6 / COUNT**0.5)
    assert trained(replace(options, clip_grad=0.0), 1)[1] == pytest.approx(0.5 * TYPICAL, rel=0.1)
    moved, _ = trained(options, 1, scale=0.0)
    assert not moved.any() and not moved.isnan().any()


def test_only_what_learns_is_counted() -> None:
    model = ModelConfig(num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=100)
    assert trained_count(StageConfig(model=model)) == parameter_count(model)
    stage = StageConfig(model=model, trainable="half", trainable_seed=3)
    shapes = {name: info.shape for name, info in InitialCheckpoint(model, 1).tensors.items()}
    frozen = sum(math.prod(shapes[name][".layers." in name :]) for name, _ in frozen_units(model, 3))
    assert trained_count(stage) == parameter_count(model) - frozen
    adapted = replace(model, lora=LoraConfig(rank=2, targets=["projection"]))
    assert trained_count(StageConfig(model=adapted)) == 5 * 2 * (32 + 32)
