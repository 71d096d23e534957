"""Generators of random numbers that another's code may turn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from flm_megatron.device import current


@contextmanager
def kept_random_state() -> Iterator[None]:
    """After the block Python's, NumPy's and torch's generators, this process's device's too, go on as if it had not
    been."""
    device = current().torch_device
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):  # not those of all GPUs here
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
