"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support.pool import Pool

# A busy machine must not fail a property, and two runs of the tests must try the same cases.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def pool() -> Pool:
    """Real gloo processes: `pool.run(world_size, function, *args)` gives the ranks' results."""
    return Pool()


@pytest.fixture
def choice_of_before() -> Iterator[None]:
    """For tests that choose implementations of kernels, which holds for the whole process."""
    from flm_megatron import kernels

    before = kernels.current()
    yield
    kernels.use(before)
