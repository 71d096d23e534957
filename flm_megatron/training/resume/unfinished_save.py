"""What becomes of the save under way when training fails: it is brought to its end where the other ranks still live.

The rank that fails first waits, while the others wait for it in a collective: their threads write all the same. A rank
whose collective broke hears that a peer is gone, and what was written is as whole as it will be.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from flm_megatron.checkpoint.sharding.asynchronous import SaveHandle

SHARE = 0.5
"""Of `distributed.timeout_s`: as long as the others surely still wait in their collective."""
BROKEN_S = 5.0
"""For what may be a matter of moments: the last rename."""


def bring_to_end(save: SaveHandle | None, error: BaseException, timeout_s: float) -> None:
    """After `error` in training: wait for a save, if there is one; says on stderr if it did not become whole."""
    if save is None or save.done:
        return
    try:
        save.wait(BROKEN_S if is_of_a_collective(error) else SHARE * timeout_s)
    except Exception as failure:
        print(f"WARNING: the checkpoint {save.path} was under way and is lost: {failure}", file=sys.stderr, flush=True)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it, whose gloo has no class of error of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
