"""The world of a tool that runs a model: the launcher's processes, or this one alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flm_megatron.config.schema import DistributedConfig
from flm_megatron.distributed.world import launched, world


@contextmanager
def tool_world(config: DistributedConfig) -> Iterator[None]:
    """Join the world that torchrun made; without a launcher make one of this process."""
    if launched():
        with world(config):
            yield
        return
    with tempfile.TemporaryDirectory() as folder, world(config, 0, 1, f"file://{Path(folder) / 'store'}"):
        yield
