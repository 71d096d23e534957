"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Pool:
    """Real gloo processes: `pool.run(world_size, function, *args)` gives the ranks' results."""
    return Pool()
