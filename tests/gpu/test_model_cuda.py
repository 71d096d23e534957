"""The model on one GPU against plain PyTorch in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.device import current
from flm_megatron.distributed.world import one_process
from tests.support.filled_model import filled_model, gradients, seeded_batch
from tests.support.reference_model import random_tensors, reference_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device")]

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=256,
    ffn_hidden_size=672,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=1000,
    output_mult=2.0,
    mup=MupConfig(enabled=True, base_hidden_size=128),
)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """One process with megatron-core's parallel state."""
    with one_process():
        yield


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_losses_and_gradients_equal_the_reference(recompute: str, precision: str, tolerance: float) -> None:
    tensors = random_tensors(MODEL)
    exact = {key: x.double().requires_grad_() for key, x in tensors.items()}
    tokens, labels = seeded_batch(MODEL, batch=2, sequence=128)
    chunks = filled_model(MODEL, tensors, recompute=recompute, precision=precision)
    device = current().torch_device
    loss = chunks[0](tokens.to(device), labels=labels.to(device))
    loss.sum().backward()
    expected = reference_loss(MODEL, exact, tokens, labels)
    expected.sum().backward()
    assert (loss.cpu() - expected).abs().max() < tolerance * expected.abs().max()
    for key, gradient in gradients(chunks, tensors).items():
        reference = exact[key].grad
        assert reference is not None
        assert (gradient - reference).norm() < tolerance * reference.norm(), key


def test_peak_memory_is_the_allocators() -> None:
    device = current()
    device.reset_peak_memory()
    before = device.peak_memory_gib()
    block = torch.ones(2**28, device=device.torch_device)
    device.synchronize()
    assert device.peak_memory_gib() == pytest.approx(before + block.numel() * 4 / 2**30, abs=0.01)
