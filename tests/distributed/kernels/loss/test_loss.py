"""Cross entropy over a vocabulary that is split over real processes, against one process in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flm_megatron import kernels
from tests.support.pool import Pool

VOCABULARY, WIDTH, TOKENS, CHANNELS = 21, 24, 7, 5


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a padded head whose padding is large, and labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, CHANNELS, generator=generator)
    head = torch.randn(WIDTH, CHANNELS, generator=generator)
    head[VOCABULARY:] = 30.0
    return hidden, head, torch.tensor([0, 20, 5, 6, 11, 12, 17])


def on_one_rank() -> dict[str, torch.Tensor]:
    """Losses and gradients of this rank's part of the vocabulary, both ways."""
    hidden, head, labels = inputs()
    group = dist.group.WORLD
    own = head.chunk(dist.get_world_size())[dist.get_rank()].clone()
    logits = (hidden @ own.t()).requires_grad_()
    losses = kernels.cross_entropy(logits, labels, VOCABULARY, group)
    losses.sum().backward()
    hidden.requires_grad_()
    own.requires_grad_()
    weights = torch.arange(TOKENS) / 2
    total, fused = kernels.linear_cross_entropy(hidden, own, labels, weights, VOCABULARY, group, chunk_tokens=3)
    total.backward()
    assert logits.grad is not None and hidden.grad is not None and own.grad is not None
    return {
        "losses": losses.detach(),
        "logits": logits.grad,
        "fused losses": fused,
        "hidden": hidden.grad,
        "head": own.grad,
    }


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_split_vocabulary_gives_the_losses_of_a_whole_one(pool: Pool, world_size: int) -> None:
    hidden, head, labels = inputs()
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    logits = (hidden @ head.t())[:, :VOCABULARY]
    logits.retain_grad()
    losses = F.cross_entropy(logits, labels, reduction="none")
    losses.sum().backward(retain_graph=True)
    assert logits.grad is not None
    expected_logits = F.pad(logits.grad.clone(), (0, WIDTH - VOCABULARY))
    hidden.grad = head.grad = None
    torch.dot(losses, torch.arange(TOKENS).double() / 2).backward()

    ranks = pool.run(world_size, on_one_rank)
    for rank in ranks:
        torch.testing.assert_close(rank["losses"].double(), losses, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rank["fused losses"].double(), losses, atol=1e-5, rtol=1e-5)
    together = {name: torch.cat([rank[name] for rank in ranks], -1 if name == "logits" else 0) for name in ranks[0]}
    torch.testing.assert_close(together["logits"].double(), expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together["head"].double(), head.grad, atol=1e-4, rtol=1e-5)
    total_hidden = sum(rank["hidden"].double() for rank in ranks)
    torch.testing.assert_close(total_hidden, hidden.grad, atol=1e-4, rtol=1e-5)
