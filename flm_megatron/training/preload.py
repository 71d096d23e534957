"""Imported once by a fork server, so that every process it forks starts with torch and megatron-core in memory."""

import atexit
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from flm_megatron.device import current

current().prepare()

from megatron.core import distributed, optimizer  # noqa: E402, F401
from megatron.core.models.gpt import gpt_model  # noqa: E402, F401

# What is imported here lives as long as the process: its garbage collector need not look at it, nor copy its pages.
gc.freeze()
atexit.register(gc.unfreeze)  # at the end libraries would call it leaked
