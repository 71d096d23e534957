"""Completes the save in progress when training fails, if the other ranks are still alive.

The rank that fails first waits for its save, while the others wait for it in a collective; their writing threads go on.
A rank whose collective broke knows that a peer is gone, so it waits only for a moment.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from flm_megatron.checkpoint.sharding.asynchronous import SaveHandle

SHARE = 0.5
"""Fraction of `distributed.timeout_s` for which the others surely still wait in their collective."""
BROKEN_S = 5.0
"""For what may only take moments: the last rename."""


def bring_to_end(save: SaveHandle | None, error: BaseException, timeout_s: float) -> None:
    """After `error` in training, wait for a save in progress; prints to stderr if it was not completed."""
    if save is None or save.done:
        return
    try:
        save.wait(BROKEN_S if is_of_a_collective(error) else SHARE * timeout_s)
    except Exception as failure:
        print(f"WARNING: the checkpoint {save.path} was under way and is lost: {failure}", file=sys.stderr, flush=True)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
