"""The plain-PyTorch reference of every kernel against float64, and what the operations promise besides numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flm_megatron import kernels
from tests.support.kernel_cases import CASES, TOLERANCE, cast_errors, draw, run_case

pytestmark = pytest.mark.usefixtures("choice_of_before")


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_references_agree_with_float64(case: str, dtype: str) -> None:
    errors = run_case(case, "torch", "cpu", dtype)
    # Factors and norms are fp32 numbers, whatever the gradients are.
    tolerance = TOLERANCE["fp32" if dtype == "fp64" and case.startswith(("clip", "adamw, gr", "linear")) else dtype]
    assert all(error < tolerance for error in errors.values()), errors


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_casts_to_fp8_round_to_the_nearest(dtype: str, by_row: bool, transpose: bool) -> None:
    errors = cast_errors("torch", "cpu", dtype, by_row, transpose)
    assert all(error <= 0.5 for error in errors.values()), errors


def test_rotary_leaves_values_alone_and_copies_nothing() -> None:
    packed = draw(6, 2, 3 * 4 * 8, dtype="fp32", device="cpu", seed=1)
    angles = torch.outer(torch.arange(6.0), torch.ones(4))
    before = packed.clone()
    query, key, value = kernels.rotary_qkv(packed, angles.cos(), angles.sin(), queries=2)
    assert query.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert torch.equal(value, before.view(6, 6, 4, 8)[:, :, 3:])
    assert torch.equal(query[0], before.view(6, 6, 4, 8)[0, :, :2])  # position 0 does not turn
    assert not torch.equal(key[1:], before.view(6, 6, 4, 8)[1:, :, 2:3])


def test_rotary_refuses_a_projection_that_backward_still_needs() -> None:
    leaf = draw(3, 1, 3 * 4, dtype="fp32", device="cpu", seed=1).requires_grad_()
    packed = leaf.exp()  # its backward pass reads its own output
    angles = torch.outer(torch.arange(3.0), torch.ones(2))
    query, _, _ = kernels.rotary_qkv(packed, angles.cos(), angles.sin(), queries=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        query.sum().backward()


def test_overwritten_logits_refuse_a_second_backward_pass() -> None:
    logits = draw(3, 9, dtype="fp32", device="cpu", seed=1).requires_grad_()
    loss = kernels.cross_entropy(logits * 1, torch.tensor([0, 3, 8]), overwrite=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_keeps_no_fp32_copy_of_the_logits() -> None:
    """Of bf16 logits nothing larger than a row of statistics is saved for backward, besides the logits."""
    saved: list[torch.Tensor] = []
    logits = draw(64, 1000, dtype="bf16", device="cpu", seed=1).requires_grad_()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.cross_entropy(logits, torch.zeros(64, dtype=torch.long))
    assert [tensor.dtype for tensor in saved if tensor.numel() > 64] == [torch.bfloat16]


def test_labels_outside_the_vocabulary_cost_the_whole_sum() -> None:
    logits = draw(2, 7, dtype="fp32", device="cpu", seed=1)
    loss = kernels.cross_entropy(logits, torch.tensor([-100, 6]), vocab_size=6)
    assert torch.allclose(loss, logits[:, :6].logsumexp(-1), rtol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor had that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(part.numel() for part in tree_leaves(result) if torch.is_tensor(part))])
        return result


def test_linear_cross_entropy_never_has_more_logits_than_one_chunk() -> None:
    hidden = draw(64, 8, dtype="fp32", device="cpu", seed=1).requires_grad_()
    weight = draw(300, 8, dtype="fp32", device="cpu", seed=2).requires_grad_()
    with Largest() as largest:
        labels, token_weights = torch.zeros(64, dtype=torch.long), torch.ones(64)
        kernels.linear_cross_entropy(hidden, weight, labels, token_weights, chunk_tokens=10)[0].backward()
    assert largest.values == 10 * 300


def test_linear_cross_entropy_needs_no_gradients_to_give_losses() -> None:
    hidden, weight = (draw(5, 4, dtype="fp32", device="cpu", seed=seed) for seed in (1, 2))
    labels = torch.tensor([0, 1, 2, 3, 4])
    total, losses = kernels.linear_cross_entropy(hidden, weight, labels, torch.ones(5))
    assert not total.requires_grad and torch.allclose(total, losses.sum())
    with torch.no_grad():
        assert torch.equal(
            kernels.linear_cross_entropy(hidden.requires_grad_(), weight, labels, torch.ones(5))[0], total
        )
