"""What is checked after a checkpoint was copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_megatron.checkpoint.tools.reshard import require_unchanged
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import DamagedError


@pytest.mark.parametrize("after", [{"a": "1", "b": "3"}, {"a": "1"}])
def test_a_copy_with_other_values_is_removed(tmp_path: Path, after: dict[str, str]) -> None:
    (copy := tmp_path / "copy").mkdir()
    (copy / "file").write_text("values")
    require_unchanged({"a": "1"}, after, copy, Processes())
    assert copy.exists()
    with pytest.raises(DamagedError, match="b: its values are not those that were recorded for the source"):
        require_unchanged({"a": "1", "b": "2"}, after, copy, Processes())
    assert not copy.exists()
