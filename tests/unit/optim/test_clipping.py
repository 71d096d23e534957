"""Clipping one optimizer's gradients by the global norm, beside torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flm_megatron import kernels
from flm_megatron.engine.prepare import prepare
from flm_megatron.optim.adamw import AdamW
from flm_megatron.optim.clipping import clip_at_step, install_clipping

LARGEST = 0.5


@pytest.fixture(autouse=True)
def engine_as_before() -> Iterator[None]:
    """What the engine has where our kernels are put is put back."""
    prepare()
    from megatron.core.optimizer import clip_grads

    names = ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl")
    before = {name: getattr(clip_grads, name) for name in names}
    yield
    for name, value in before.items():
        setattr(clip_grads, name, value)


def parameters(scale: float) -> list[torch.nn.Parameter]:
    """Two parameters with gradients whose norm is `scale`."""
    chance = torch.Generator().manual_seed(3)
    made = [torch.nn.Parameter(torch.randn(size, generator=chance)) for size in ((5, 3), (7,))]
    drawn = [torch.randn(parameter.shape, generator=chance) for parameter in made]
    norm = torch.cat([gradient.flatten() for gradient in drawn]).norm()
    for parameter, gradient in zip(made, drawn, strict=True):
        parameter.grad = gradient * scale / norm
    return made


def part(optimizer: Any, of: list[torch.nn.Parameter], clip_grad: float = LARGEST, **fields: Any) -> Any:
    """One of megatron-core's optimizers, as far as clipping looks at it."""
    return SimpleNamespace(
        config=SimpleNamespace(clip_grad=clip_grad), optimizer=optimizer, get_parameters=lambda: of, **fields
    )


@pytest.mark.parametrize("norm", [0.1, 0.4999, 0.5001, 3.0, 1e4])
def test_an_update_is_that_of_clipped_gradients(norm: float) -> None:
    # Without moments' memory and with a large epsilon the update shows the size of the gradient.
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.0}
    ours, theirs = parameters(norm), parameters(norm)
    optimizer = AdamW([{"params": ours}], **options)
    clip_at_step(part(optimizer, ours), norm)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(theirs, LARGEST)
    torch.optim.AdamW(theirs, **options).step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("off", [{"clip_grad": 0.0}, {"is_stub_optimizer": True}], ids=["off", "without parameters"])
def test_nothing_is_clipped_where_it_is_off(off: dict[str, Any]) -> None:
    ours, untouched = parameters(3.0), parameters(3.0)
    optimizer = torch.optim.SGD(ours, lr=1.0)
    clip_at_step(part(optimizer, ours, **off), 3.0)
    for mine, other in zip(ours, untouched, strict=True):
        assert mine.grad is not None and other.grad is not None and torch.equal(mine.grad, other.grad)


def test_gradients_of_another_optimizer_are_scaled_in_place() -> None:
    assert install_clipping() is True
    ours, theirs = parameters(3.0), parameters(3.0)
    clip_at_step(part(torch.optim.SGD(ours, lr=1.0), ours), 3.0)
    torch.nn.utils.clip_grad_norm_(theirs, LARGEST)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5)


def test_norms_are_ours_where_megatron_core_asks_for_one() -> None:
    from megatron.core.optimizer import clip_grads

    install_clipping()
    gradients = [parameter.grad for parameter in parameters(3.0) if parameter.grad is not None]
    norm, each = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [gradients], False)
    assert norm.shape == (1,) and float(norm) == pytest.approx(3.0, rel=1e-6) and each is None
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, torch.zeros(1), [[], []], 0.5)  # nothing


def test_kernels_of_others_are_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = kernels.current()
    theirs = replace(choice, names={**choice.names, "grad_clip": "te"})
    monkeypatch.setattr(kernels, "current", lambda: theirs)
    assert install_clipping() is False
