"""What the ranks hold is taken for the checkpoint of it alone."""

from __future__ import annotations

import weakref

import pytest
import torch

from flm_megatron.checkpoint.exchange.live import live_source
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.errors import FlmError
from flm_megatron.training.resume.live import LiveBoundary
from tests.support.checkpoint_cases import Memory


def saved(step: int) -> Memory:
    """A checkpoint without tensors of a step of stage `small`."""
    return Memory({}, Manifest(position=StagePosition(step, stage="small")))


def test_another_checkpoint_than_of_what_the_ranks_hold_is_refused() -> None:
    boundary = LiveBoundary(StagePosition(4, stage="small"), [])
    live = boundary.of(saved(4))
    assert live is not None and live.manifest == saved(4).manifest and live_source(live) is live
    with pytest.raises(FlmError, match=r"the ranks hold stage 'small' at step 4, but the run goes on from .* step 2"):
        boundary.of(saved(2))
    boundary.release()
    assert boundary.of(saved(2)) is None


def test_a_view_that_outlives_the_boundary_holds_no_memory() -> None:
    tensor = torch.zeros(3)
    boundary = LiveBoundary(StagePosition(4, stage="small"), [("norm", Region((0,), (3,)), tensor)])
    view, held = boundary.of(saved(4)), weakref.ref(tensor)
    del tensor
    assert view is not None and held() is not None
    boundary.release()
    assert held() is None
