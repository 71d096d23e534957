"""Layer distances as a file and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm_megatron.errors import RequestError
from flm_megatron.growth.distance import LayerDistance, distance_table, read_distances, write_distances

FOUND = [LayerDistance(0.25, 0.5), LayerDistance(0.0625, 0.75), LayerDistance(0.125, 0.25)]


def test_distances_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_distances(FOUND, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text())[1] == {"cosine": 0.0625, "l2": 0.75}
    assert read_distances(str(tmp_path / "x.json"), "cosine") == [0.25, 0.0625, 0.125]
    assert read_distances(str(tmp_path / "x.json"), "l2") == [0.5, 0.75, 0.25]


@pytest.mark.parametrize("text", ["", "[1]", '[{"cosine": 1}]', '[{"cosine": 1, "l2": "far"}]', "{}}"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RequestError, match=r"x\.json holds no layer distances .*`flm distance --out`"):
        read_distances(str(tmp_path / "x.json"), "l2")
    with pytest.raises(RequestError, match="holds no layer distances"):
        read_distances(str(tmp_path / "none"), "l2")


def test_the_table_ranks_layers_from_the_one_nearest_to_the_identity() -> None:
    rows = [line.split() for line in distance_table(FOUND).splitlines()]
    assert rows == [
        ["layer", "cosine", "relative", "L2", "rank"],
        ["0", "2.500e-01", "5.000e-01", "3"],
        ["1", "6.250e-02", "7.500e-01", "1"],
        ["2", "1.250e-01", "2.500e-01", "2"],
    ]
