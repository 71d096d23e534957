"""The divergence from a teacher against plain PyTorch in float64, whole and in shards of the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flm_megatron.kernels import kl_divergence
from flm_megatron.kernels.divergence import over_vocabulary, reference

TOKENS, VOCABULARY, WIDTH = 7, 13, 16


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student with columns of padding, and of a teacher without."""
    generator = torch.Generator().manual_seed(5)
    student = 3 * torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def oracle(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """PyTorch's own."""
    log_q, log_p = (F.log_softmax(x[..., :VOCABULARY] / temperature, -1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_it_is_that_of_plain_pytorch_with_its_gradient(temperature: float) -> None:
    student, teacher = inputs()
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    found = kl_divergence(student, teacher, temperature, VOCABULARY)
    wanted = oracle(student, teacher, temperature)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-13)
    (grad,), (exact,) = (torch.autograd.grad((x * weights).sum(), student) for x in (found, wanted))
    torch.testing.assert_close(grad, exact, atol=1e-13, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, teacher, temperature, VOCABULARY), student)
    assert kl_divergence(teacher, teacher, temperature).abs().max() < 1e-14


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_lower_precisions_are_computed_in_fp32(dtype: torch.dtype, bound: float) -> None:
    student, teacher = inputs(dtype)
    exact = student.detach().double().requires_grad_()
    found, wanted = kl_divergence(student, teacher, 2.0, VOCABULARY), oracle(exact, teacher.double(), 2.0)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=2e-6)
    (grad,), (other,) = torch.autograd.grad(found.sum(), student), torch.autograd.grad(wanted.sum(), exact)
    assert grad.dtype is dtype
    torch.testing.assert_close(grad.double(), other, atol=bound, rtol=bound)


@pytest.mark.parametrize("width", [4, 8])
def test_shards_add_up_to_the_whole_one_of_padding_alone_among_them(width: int) -> None:
    student, teacher = inputs()
    student = F.pad(student.detach(), (0, 8))
    shards = [(student[:, at : at + width], teacher[:, at : at + width]) for at in range(0, WIDTH + 8, width)]
    found = torch.stack([reference.statistics(mine, other, 2.0) for mine, other in shards])
    *log_sums, divergence = over_vocabulary(found)
    torch.testing.assert_close(divergence, oracle(student, teacher, 2.0), atol=1e-13, rtol=1e-13)
    gradients = [torch.empty_like(mine) for mine, _ in shards]
    for (mine, other), out in zip(shards, gradients, strict=True):
        reference.gradient(mine, other, 2.0, log_sums, torch.ones(TOKENS, dtype=torch.float64), out)
    leaf = student.clone().requires_grad_()
    oracle(leaf, teacher, 2.0).sum().backward()
    torch.testing.assert_close(torch.cat(gradients, 1), leaf.grad, atol=1e-13, rtol=1e-13)
