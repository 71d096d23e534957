"""A live checkpoint under lazy ones: what these read of it arrives before they compute."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.exchange.live import LiveCheckpoint
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.distributed.process_group import process_group
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import make_plan
from tests.support.growth_cases import CLONED, growth, old_model, trained


@pytest.mark.parametrize("operator", ["mask", "clone"])
def test_a_growth_over_it_has_the_bits_of_one_over_a_stored_checkpoint(operator: str, tmp_path: Path) -> None:
    old = old_model()
    plan = make_plan(old, old_model(**CLONED["all"]), growth(operator), 3, [0.1] * 3, "big", None)
    source = trained(old, torch.bfloat16, optimizer=True)
    held = [  # in many regions, so that most of what is read lies in several
        (name, region, source.values[name][region.slices])
        for name, info in source.tensors.items()
        for region in split_region(Region.whole(info.shape), 100)
    ]
    live = LiveCheckpoint(source, tuple(held), round_bytes=2**15)
    stored, view = GrownCheckpoint(source, plan), GrownCheckpoint(live, plan)
    regions = [(n, r) for n, info in view.tensors.items() for r in split_region(Region.whole(info.shape), 3000)]
    with process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1):
        rounds = 0
        seen = []
        for arrived in live.rounds([partial(view.read, *each) for each in regions]):
            for number in arrived:
                assert torch.equal(view.read(*regions[number]), stored.read(*regions[number])), regions[number]
            seen += arrived
            rounds += 1
        assert seen == list(range(len(regions))) and rounds > 5
        with pytest.raises(RequestError, match="has no tensor of_nobody"):
            next(live.rounds([partial(live.read, "of_nobody")]))
    live.release()
    memory = [weakref.ref(tensor) for _, _, tensor in held]
    del held[:], arrived
    assert not any(ref() is not None for ref in memory), "the old stage's memory is free once the new one is loaded"
