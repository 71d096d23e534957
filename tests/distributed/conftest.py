"""What tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and datasets."""
    return make_data(tmp_path_factory.mktemp("data"))
