"""Generators after another's code: as they were, and those of other processes' GPUs untouched."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flm_megatron.training import random_state
from flm_megatron.training.random_state import kept_random_state


def drawn() -> tuple[float, float, float]:
    """A number of each generator."""
    return random.random(), float(np.random.random()), float(torch.rand(1))


def test_the_block_leaves_no_trace_even_if_it_raises() -> None:
    with kept_random_state():
        expected = drawn()
    with pytest.raises(ValueError, match="mine"), kept_random_state():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise ValueError("mine")
    assert drawn() == expected


@pytest.mark.filterwarnings("error")
def test_of_eight_gpus_only_that_of_the_process_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    mine = torch.device("cuda", 3)
    monkeypatch.setattr(random_state, "current", lambda: SimpleNamespace(torch_device=mine))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append(device))
    with kept_random_state():
        pass
    assert asked == [mine, mine]
