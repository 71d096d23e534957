"""Imported once by a fork server, so that every process it forks starts with torch and megatron-core in memory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from flm_megatron.device import current

current().prepare()

from megatron.core import distributed, optimizer  # noqa: E402, F401
from megatron.core.models.gpt import gpt_model  # noqa: E402, F401
