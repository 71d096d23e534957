"""AdamW against torch.optim.AdamW, and in the place where megatron-core looks for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flm_megatron.optim import adamw as module
from flm_megatron.optim.adamw import AdamW


def _parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(17, 5), (33,), (4, 3, 2)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def _groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:2], "lr": 3e-3, "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]


def _train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(11)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * (i + 1) * (step + 1)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_steps_as_torch(dtype: torch.dtype) -> None:
    ours, theirs = _parameters(dtype), _parameters(dtype)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    a, b = AdamW(_groups(ours), **options), torch.optim.AdamW(_groups(theirs), fused=True, **options)
    _train(a, ours, 7)
    _train(b, theirs, 7)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(a.state[mine]["exp_avg"], b.state[other]["exp_avg"])
        assert torch.equal(a.state[mine]["exp_avg_sq"], b.state[other]["exp_avg_sq"])
        assert set(a.state[mine]) == {"exp_avg", "exp_avg_sq"}
    assert [g["step"] for g in a.param_groups] == [7, 7]


def test_close_to_the_plain_form_of_torch_in_float64() -> None:
    ours, theirs = _parameters(torch.float64), _parameters(torch.float64)
    a = AdamW(_groups(ours), lr=1e-2)
    b = torch.optim.AdamW(_groups(theirs), lr=1e-2, foreach=False, fused=False)
    _train(a, ours, 20)
    _train(b, theirs, 20)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_form_without_the_fused_kernel_agrees_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = _parameters(torch.float64), _parameters(torch.float64)
    _train(AdamW(_groups(fused), lr=1e-2), fused, 5)
    monkeypatch.setattr(module, "FUSED_DEVICES", ())
    monkeypatch.setattr(torch, "_fused_adamw_", None)
    optimizer = AdamW(_groups(plain), lr=1e-2)
    _train(optimizer, plain, 5)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["step"] == 5


def test_empty_groups_and_zero_size_shards_count_steps() -> None:
    empty = torch.nn.Parameter(torch.zeros(0))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": own} for own in ([], [empty], [weight])], lr=0.1)
    empty.grad, weight.grad = torch.zeros(0), torch.ones(3)
    optimizer.step()
    assert [g["step"] for g in optimizer.param_groups] == [1, 1, 1]
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_parameters_without_gradient_stay() -> None:
    still, moving = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([still, moving], lr=0.1, weight_decay=0.5)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2)) and still not in optimizer.state
    assert not torch.equal(moving, torch.ones(2))


def test_state_dict_carries_the_step_and_resumes_exactly() -> None:
    whole, resumed = _parameters(torch.float32), _parameters(torch.float32)
    first, before = AdamW(_groups(whole)), AdamW(_groups(resumed))
    _train(first, whole, 3)
    _train(before, resumed, 3)
    after = AdamW(_groups(resumed))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert [g["step"] for g in after.param_groups] == [3, 3]
    _train(first, whole, 2)
    _train(after, resumed, 2)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"adam_w_mode": False}, "adam_w_mode"),
        ({"capturable": True}, "capturable"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW([torch.nn.Parameter(torch.ones(1))], **options)


def test_clipping_is_part_of_one_step_and_of_no_other() -> None:
    """Against gradients clipped before, with old and young entries in the same optimizer."""
    ours, others = [torch.ones(5), torch.full((3,), 2.0)], [torch.ones(5), torch.full((3,), 2.0)]
    optimizers = [AdamW(params, lr=0.1, betas=(0.5, 0.9), eps=1e-3) for params in (ours, others)]
    gradients = [[torch.randn(5), torch.randn(3)] for _ in range(3)]
    for number, drawn in enumerate(gradients):
        factor = 0.25 if number == 1 else 1.0
        for params, optimizer, scaled in ((ours, optimizers[0], 1.0), (others, optimizers[1], factor)):
            for param, gradient in zip(params, drawn, strict=True):
                param.grad = gradient * scaled
            if number == 0:
                optimizer.state[params[1]]["step_offset"] = torch.zeros(3, dtype=torch.int32)
        if number == 1:
            optimizers[0].clip(factor)
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(ours, others, strict=True):
            assert one.grad is not None and other.grad is not None
            assert torch.equal(one.grad, other.grad)
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
