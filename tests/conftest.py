"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support.object_store import ObjectStore
from tests.support.pool import Pool

# A busy machine must not fail a property, and two runs of the tests must try the same cases.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def pool() -> Pool:
    """Real gloo processes: `pool.run(world_size, function, *args)` gives the ranks' results."""
    return Pool()


@pytest.fixture(scope="session")
def _object_store_server() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def object_store(_object_store_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server on loopback with an empty bucket, where the environment leads: see tests/support/object_store.py."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _object_store_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    _object_store_server.begin()
    yield _object_store_server
    _object_store_server.end()


@pytest.fixture
def choice_of_before() -> Iterator[None]:
    """For tests that choose implementations of kernels, which holds for the whole process."""
    from flm_megatron import kernels

    before = kernels.current()
    yield
    kernels.use(before)
