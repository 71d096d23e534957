"""Head and loss as one operation: where its gradient goes, what it keeps, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flm_megatron import kernels
from flm_megatron.config.rules import check
from flm_megatron.config.schema import KernelsConfig, RunConfig, StabilityConfig, StageConfig
from flm_megatron.errors import RequestError

pytestmark = pytest.mark.usefixtures("choice_of_before")

TOKENS, WIDTH, CHANNELS, CHUNK = 48, 60, 8, 16


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head, labels and a loss mask."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, CHANNELS, generator=generator).requires_grad_()
    head = torch.randn(WIDTH, CHANNELS, generator=generator).requires_grad_()
    labels = torch.randint(WIDTH, (TOKENS,), generator=generator)
    return hidden, head, labels, (torch.rand(TOKENS, generator=generator) < 0.7).float()


def test_the_gradient_of_the_head_is_added_to_its_buffer() -> None:
    hidden, head, labels, mask = inputs()
    buffer = torch.full((WIDTH, CHANNELS), 2.0)
    total, _ = kernels.linear_cross_entropy(hidden, head, labels, mask, chunk_tokens=CHUNK, buffer=buffer)
    total.backward()
    got = hidden.grad
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    losses = F.cross_entropy(exact_hidden @ exact_head.t(), labels, reduction="none")
    (losses * mask).sum().backward()
    assert exact_head.grad is not None and exact_hidden.grad is not None
    torch.testing.assert_close(buffer.double() - 2, exact_head.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, exact_hidden.grad.float(), atol=1e-5, rtol=1e-5)


def test_a_sum_that_is_scaled_is_refused_once_its_gradient_lies_in_the_buffer() -> None:
    hidden, head, labels, mask = inputs()
    total, _ = kernels.linear_cross_entropy(hidden, head, labels, mask, buffer=torch.zeros(WIDTH, CHANNELS))
    with pytest.raises(RuntimeError, match="with a gradient of 1"):
        (2 * total).backward()


@pytest.mark.parametrize("enabled", [False, True])
def test_a_buffer_stays_as_it_is_without_gradients_and_for_a_frozen_head(enabled: bool) -> None:
    hidden, head, labels, mask = inputs()
    buffer = torch.zeros(WIDTH, CHANNELS)
    with torch.set_grad_enabled(enabled):
        total, losses = kernels.linear_cross_entropy(hidden, head.detach(), labels, mask, buffer=buffer)
    if enabled:
        total.backward()
    assert not buffer.any()
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ head.t(), labels, reduction="none"))


class Largest(TorchDispatchMode):
    """Notes the largest number of values of a tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and look at what it gives."""
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *sizes])
        return result


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    hidden, head, labels, mask = inputs()
    with Largest() as largest:
        total, _ = kernels.linear_cross_entropy(hidden, head, labels, mask, chunk_tokens=CHUNK)
        total.backward()
    assert largest.values == CHUNK * WIDTH


def test_the_run_file_decides_and_auto_goes_by_the_size_of_the_logits() -> None:
    small, large = torch.empty(64, CHANNELS, device="meta"), torch.empty(1 << 20, CHANNELS, device="meta")
    head = torch.empty(1024, CHANNELS, device="meta")
    answers = {}
    for asked in ("auto", "fused", "separate"):
        kernels.use(kernels.choose(KernelsConfig(head_and_loss=asked)))
        answers[asked] = [kernels.fuses_head_and_loss(hidden, head) for hidden in (small, large)]
    assert answers == {"auto": [False, True], "fused": [True, True], "separate": [False, False]}


def test_a_z_loss_refuses_the_fused_head() -> None:
    stage = StageConfig(tokens=1000, stability=StabilityConfig(z_loss=1e-4))
    stage = replace(stage, model=replace(stage.model, vocab_size=128))
    run = RunConfig(stages=[stage])
    check(run)
    with pytest.raises(RequestError, match=r"head_and_loss is fused, but stages.0.stability.z_loss is 0.0001"):
        check(replace(run, kernels=KernelsConfig(head_and_loss="fused")))
