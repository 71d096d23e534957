"""Making a process ready for megatron-core, before its first import."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import TYPE_CHECKING

from flm_megatron.device import current
from flm_megatron.engine.version import require_engine

if TYPE_CHECKING:
    import torch

IGNORED = (
    r"The \.grad attribute of a Tensor that is not a leaf",  # the engine probes its flat shards
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # called by the engine
    # The device sets it where there is CUDA.
    r"When using (sequence parallelism|async grad allreduce) it is recommended to set .*CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Warnings of torch and the engine that tell a user nothing to act on."""


@cache
def prepare() -> None:
    """Check the engine's version, make the device ready for it and import it, once in a process.

    Raises:
        RequestError: megatron-core is missing, or is of a version that this program does not work with.
    """
    require_engine()
    device = current()
    device.prepare()
    with warnings.catch_warnings():
        # They say at import which optional packages they go without; the program never needs them.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron.core import distributed, optimizer  # noqa: F401
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401
        from megatron.core.tensor_parallel import random
    if device.random_state is not None:
        random._get_cuda_rng_state = device.random_state.get
        random._set_cuda_rng_state = device.random_state.set
    if hasattr(random, "_get_share_storage"):  # from 0.19 on
        random._get_share_storage = lambda: put_back
    _quiet()


def put_back(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give an activation whose memory was freed its values again, below autograd, as megatron-core 0.16 does.

    From 0.19 on it has C++ for this, which every host compiles in its first backward pass; where that was killed, its
    lock is waited for for ever by all later ones.
    """
    storage = recomputed.untyped_storage()
    discarded.untyped_storage().resize_(storage.size())
    discarded.untyped_storage().copy_(storage)


def _quiet() -> None:
    """Ignore, in this process, exactly what of its messages is for its own developers."""
    # It does not know our feed-forward module by name, and says so once per layer; from 0.19 on, that new features go
    # into another class than GPTModel.
    for module in ("transformer.transformer_layer", "models.gpt.gpt_model"):
        logging.getLogger(f"megatron.core.{module}").setLevel(logging.ERROR)
    for message in IGNORED:
        warnings.filterwarnings("ignore", message=message)
