"""A cache of its own for each test, and short waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_megatron.storage import retry


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    return tmp_path / "cache"
