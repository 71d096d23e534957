"""Attention within packed segments on a GPU: torch's variable-length attention against one segment after another."""

from __future__ import annotations

import pytest
import torch

from flm_megatron.device import current
from flm_megatron.model.attention import segments as module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device")]


@pytest.mark.parametrize(("samples", "window"), [(1, None), (3, None), (3, 300)])
@pytest.mark.parametrize(("groups", "heads"), [(8, 1), (2, 4)])
def test_one_call_for_all_segments_is_attention_within_each(
    groups: int, heads: int, samples: int, window: int | None
) -> None:
    device = current().torch_device
    found = module.obstacle(device, torch.bfloat16, 128, heads > 1, window is not None)
    if found is not None:
        pytest.skip(found)
    sequence, chance = 2048, torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 400, (samples, sequence), generator=chance).eq(0).cumsum(1)
    ends = module.segment_ends(numbers).to(device)
    packed = torch.randn(sequence, samples * groups, heads + 2, 128, generator=chance)
    results = []
    for attend, dtype in ((module._in_one_call, torch.bfloat16), (module._one_after_another, torch.float32)):
        parts = packed.to(torch.bfloat16).to(device, dtype).split([heads, 1, 1], dim=2)
        query, key, value = (part.detach().requires_grad_() for part in parts)
        output = attend(query, key, value, ends, None, window)
        gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        results.append([x.float() for x in (output, *gradients)])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()
