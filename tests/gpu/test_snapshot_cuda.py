"""Copies for saves on a GPU: made beside other work, of the values of their time."""

from __future__ import annotations

import pytest
import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.sharding.snapshot import BackgroundCopies
from flm_megatron.device import current

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device")]

SIDE = 8192


def test_copies_are_of_their_time_and_the_host_does_not_wait() -> None:
    device = current().torch_device
    values = torch.randn(SIDE, SIDE, device=device)
    expected = values.cpu()
    BackgroundCopies([("a", Region.whole((SIDE, SIDE)), values)]).release()  # memory is made and locked
    busy = torch.randn(SIDE, SIDE, device=device)
    queued = torch.cuda.Event()
    for _ in range(20):
        busy = busy @ busy * 1e-4
    queued.record()
    copies = BackgroundCopies([("a", Region.whole((SIDE, SIDE)), values)])
    assert not queued.query(), "the host came here before the GPU had done what was queued"
    current().hold_changes()
    values.zero_()
    copies.wait()
    assert torch.equal(copies.regions[0][2], expected)
    copies.release()
    torch.cuda.synchronize()
    assert not values.any()
