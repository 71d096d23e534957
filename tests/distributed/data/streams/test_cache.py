"""Many processes open the same data at the same time."""

from __future__ import annotations

from pathlib import Path

from tests.support import data_cases
from tests.support.pool import Pool


def _open(folder: str) -> tuple[list[tuple[str, int, int]], list[list[int]]]:
    import torch.distributed

    from flm_megatron.data.streams.stream import SampleStream

    torch.distributed.barrier()
    stream = SampleStream(data_cases.config(Path(folder), {"web": 0.7, "code": 0.3}), seed=4)
    return [stream.sample_ids(i) for i in range(50)], [stream[i]["tokens"].tolist() for i in range(50)]


def _open_on_the_last_rank(folder: str) -> int:
    import torch.distributed

    from flm_megatron.data.streams.stream import SampleStream

    if torch.distributed.get_rank() == 0:
        return 0
    stream = SampleStream(data_cases.config(Path(folder), {"web": 1}), seed=4)
    return int(stream[3]["tokens"].sum())


def test_any_rank_can_build_the_index(pool: Pool, tmp_path: Path) -> None:
    """The engine builds on rank 0 only; a machine without it has to have an index all the same."""
    from flm_megatron.data.streams.stream import SampleStream

    data_cases.datasets(tmp_path, {"web": 30})
    found = pool.run(2, _open_on_the_last_rank, str(tmp_path))[1]
    assert found == int(SampleStream(data_cases.config(tmp_path, {"web": 1}), seed=4)[3]["tokens"].sum())


def test_processes_that_share_a_disk_build_the_index_once_and_read_the_same(pool: Pool, tmp_path: Path) -> None:
    """Four at once, none of which finds an index: all read the same samples, and one index of each source is left."""
    data_cases.datasets(tmp_path, {"web": 30, "code": 20})
    results = pool.run(4, _open, str(tmp_path))
    assert all(result == results[0] for result in results)
    for name in ("web", "code"):
        folders = [path for path in (tmp_path / f"{name}_cache").iterdir() if path.is_dir()]
        assert len(folders) == 1
        assert len(list(folders[0].glob("*.npy"))) == 3
        assert not list((tmp_path / f"{name}_cache").glob("*.partial"))
