"""Warnings of torch and megatron-core that tell a user of this program nothing to act on."""

from __future__ import annotations

import logging
import warnings

MESSAGES = (
    r"The \.grad attribute of a Tensor that is not a leaf",  # the engine probes its flat shards
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # called by the engine
    # The device sets it where there is CUDA.
    r"When using (sequence parallelism|async grad allreduce) it is recommended to set .*CUDA_DEVICE_MAX_CONNECTIONS",
)


def quiet_engine() -> None:
    """Ignore exactly these warnings in this process."""
    # The engine does not know our feed-forward module by name, and says so once per layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
