"""Imported once by a fork server, so that every process it forks starts with torch and megatron-core in memory."""

import atexit
import gc
import os
import signal


def _listen_again() -> None:
    """Undo, in each forked process, the server's ignoring of the signal."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A signal to all of a run's processes is for those that train: without the server it could not be told how they end.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_listen_again)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from flm_megatron.engine.prepare import prepare  # noqa: E402

prepare()

# What is imported here lives as long as the process: its garbage collector need not look at it, nor copy its pages.
gc.freeze()
atexit.register(gc.unfreeze)  # at the end libraries would call it leaked
