"""Reading and writing `torch_dist` folders: any region of any chunks, and every kind of damage named."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint import manifest
from flm_megatron.checkpoint.files.manifest import MANIFEST, file_checksum, manifest_text, read_manifest, verify
from flm_megatron.checkpoint.files.stored_array import as_bytes
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.regions import flat_regions, split_region
from flm_megatron.checkpoint.torch_dist import writer
from flm_megatron.checkpoint.torch_dist.chunk_index import ChunkIndex, StoredChunk
from flm_megatron.checkpoint.torch_dist.logical_hash import logical_hash, partial_hash, tensor_hashes
from flm_megatron.checkpoint.torch_dist.shard_file import SourceRegion
from flm_megatron.checkpoint.torch_dist.tensor_record import encode
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint, plan_files, write_checkpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError, FlmError, RequestError
from tests.support.checkpoint_cases import as_foreign, flip

MODEL = ModelConfig(num_layers=3, hidden_size=24, ffn_hidden_size=20, num_attention_heads=3, vocab_size=77)
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


class InMemory(LogicalCheckpoint):
    """Tensors held in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values, self.manifest = tensors, Manifest()
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        return self.values[name][region.slices] if region else self.values[name]


@pytest.fixture(scope="module")
def source() -> InitialCheckpoint:
    return InitialCheckpoint(MODEL, 1, optimizer=True, dtype=torch.bfloat16)


@pytest.fixture
def checkpoint(tmp_path: Path, source: InitialCheckpoint) -> Path:
    copy_checkpoint(
        source, tmp_path / "a", Manifest(position=StagePosition(4, tokens=10, stage="first")), chunk_bytes=999
    )
    return tmp_path / "a"


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_chunks_are_found_by_region(data: st.DataObject) -> None:
    shape = (data.draw(st.sampled_from([1, 140, 256, 257, 3000])), 6)
    chunks = [
        StoredChunk(region, "f", number, 1)
        for number, region in enumerate(split_region(Region.whole(shape), data.draw(st.integers(1, 5000))))
    ]
    region = random_region(data, shape)
    wanted = {(chunk, part) for chunk in chunks if (part := chunk.region.intersect(region))}
    found = ChunkIndex(shape, chunks).meeting(region)
    assert len(found) == len(wanted) and set(found) == wanted


def random_region(data: st.DataObject, shape: tuple[int, ...]) -> Region:
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    return Region(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_region_of_any_chunks(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(SHAPES)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    tensor = torch.randn(shape).to(dtype)
    folder = tmp_path_factory.mktemp("any")
    written = copy_checkpoint(
        InMemory({"x": tensor}), folder / "a", Manifest(), chunk_bytes=data.draw(st.integers(1, 400))
    )
    checkpoint = open_checkpoint(folder / "a")
    for _ in range(4):
        region = random_region(data, shape)
        assert torch.equal(checkpoint.read("x", region), tensor[region.slices])
    assert torch.equal(checkpoint.read("x"), tensor)
    assert written.logical_hash == logical_hash(checkpoint) == logical_hash(InMemory({"x": tensor}))


@settings(deadline=None)
@given(SHAPES, st.data())
def test_flat_ranges_are_covered_by_regions(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = torch.Size(shape).numel()
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).reshape(shape)
    parts = list(flat_regions(shape, start, end))
    found = [value for part in parts for value in whole[part.slices].flatten().tolist()]
    assert found == list(range(start, end))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 60), st.data())
def test_split_regions_cover_each_value_once(shape: tuple[int, ...], limit: int, data: st.DataObject) -> None:
    region = random_region(data, shape)
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = list(split_region(region, limit))
    assert all(part.numel <= limit for part in parts)
    assert [v for part in parts for v in whole[part.slices].flatten().tolist()] == whole[
        region.slices
    ].flatten().tolist()


@settings(deadline=None)
@given(SHAPES, st.data())
def test_hash_is_the_sum_over_any_regions_and_sees_any_change(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.randn(shape)
    whole = partial_hash(shape, Region.whole(shape), tensor)
    parts = split_region(Region.whole(shape), data.draw(st.integers(1, 30)))
    assert sum(partial_hash(shape, part, tensor[part.slices]) for part in parts) % 2**64 == whole
    bits = tensor.clone().view(torch.int32).flatten()
    bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1 << data.draw(st.integers(0, 30))
    assert partial_hash(shape, Region.whole(shape), bits.view(torch.float32).reshape(shape)) != whole


def test_hash_sees_moved_values_signs_dtypes_and_names() -> None:
    x = torch.randn(30, 40)
    moved, signs = x.flip(0), x.clone()
    signs[3:5] *= -1
    hashes = [logical_hash(InMemory({"x": t})) for t in (x, moved, x.t().contiguous(), signs, x.bfloat16())]
    hashes.append(logical_hash(InMemory({"y": x})))
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4), (), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_records_are_files_of_torch_save(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape) * 100).to(dtype)
    raw = bytes(as_bytes(tensor)) if tensor.numel() else b""
    head, tail = encode(dtype, shape, zlib.crc32(raw))
    assert len(head) % 64 == 0
    assert torch.equal(torch.load(io.BytesIO(head + raw + tail), weights_only=True), tensor)
    assert zipfile.ZipFile(io.BytesIO(head + raw + tail)).testzip() is None


@pytest.mark.parametrize("size", [1, 3, 8])
def test_files_are_shared_out_evenly(size: int, source: InitialCheckpoint) -> None:
    plans = [plan_files(source.tensors, rank, size, chunk_bytes=500) for rank in range(size)]
    parts = [part for plan in plans for regions in plan.values() for part in regions]
    assert len(parts) == len(set(parts))
    per_rank = [sum(r.numel * source.tensors[n].dtype.itemsize for f in plan.values() for n, r in f) for plan in plans]
    assert sum(per_rank) == sum(Region.whole(i.shape).numel * i.dtype.itemsize for i in source.tensors.values())
    assert max(per_rank) - min(per_rank) <= 2 * 500


def test_files_are_no_longer_than_asked(
    source: InitialCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 20000)
    manifest = copy_checkpoint(source, tmp_path / "a", Manifest(), chunk_bytes=1000)
    shards = [entry.size for name, entry in manifest.files.items() if name.endswith(".distcp")]
    assert len(shards) > 3 and max(shards) < 60000
    assert tensor_hashes(open_checkpoint(tmp_path / "a")) == tensor_hashes(source)


def test_foreign_chunks_that_are_views_or_transposed(tmp_path: Path) -> None:
    base = torch.randn(6, 10)
    state = {"narrowed": base[2:5], "column": base[:, 3:4], "transposed": base.t()}
    dcp.save(state, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "a")
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
        region = Region((1, 0), (2, 1))
        assert torch.equal(checkpoint.read(name, region), tensor[region.slices])


def test_manifest_says_what_was_given_and_written(checkpoint: Path, source: InitialCheckpoint) -> None:
    opened = open_checkpoint(checkpoint)
    assert opened.manifest.position == StagePosition(4, tokens=10, stage="first")
    assert opened.manifest.optimizer == "logical" and opened.has_optimizer()
    assert opened.manifest.logical_hash == logical_hash(source)
    present = {entry.name for entry in checkpoint.iterdir()} - {MANIFEST}
    assert set(opened.manifest.files) == present
    assert verify(checkpoint) == verify(checkpoint, quick=True) == opened.manifest


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
def test_verify_names_a_changed_a_truncated_and_a_missing_file(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    flip(file, file.stat().st_size // 2)
    verify(checkpoint, quick=True)
    with pytest.raises(DamagedError, match=f"{name}: checksum"):
        verify(checkpoint)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DamagedError, match=f"{name} has .* bytes instead of"):
        verify(checkpoint, quick=True)
    file.unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        verify(checkpoint, quick=True)


def test_a_disk_that_does_not_tell_a_size_is_no_damage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def stale(path: Path, **options: Any) -> os.stat_result:
        if path.suffix == ".distcp":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(RequestError, match=r"distcp: cannot be read \(Stale file handle\): see to its disk first"):
        verify(checkpoint, quick=True)


def test_a_file_is_read_in_large_blocks_and_each_is_told(tmp_path: Path) -> None:
    data = os.urandom(20 * 2**20 + 5)
    (tmp_path / "x").write_bytes(data)
    told = list[int]()
    assert file_checksum(tmp_path / "x", told.append) == f"{zlib.crc32(data):08x}"
    assert sum(told) == len(data) and len(told) <= 20


def test_a_changed_manifest(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint / MANIFEST
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(DamagedError, match="changed or damaged"):
        open_checkpoint(checkpoint)
    monkeypatch.setattr(manifest, "VERSION", 2)
    file.write_text(manifest_text(Manifest()))
    monkeypatch.undo()
    with pytest.raises(RequestError, match="version 2"):
        open_checkpoint(checkpoint)
    file.write_text("{")
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        read_manifest(checkpoint)
    file.unlink()
    with pytest.raises(DamagedError, match=r"no manifest\.json"):
        verify(checkpoint)


def test_reading_a_truncated_or_missing_shard_names_tensor_and_file(checkpoint: Path) -> None:
    shard = checkpoint / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    opened = open_checkpoint(checkpoint)
    last = list(opened.tensors)[-1]
    with pytest.raises(DamagedError, match=rf"{last}: .*__0_0\.distcp"):
        opened.read(last)
    shard.unlink()
    with pytest.raises(DamagedError, match=r"output_layer\.weight: .*__0_0\.distcp"):
        open_checkpoint(checkpoint).read("output_layer.weight")


def test_a_tensor_that_is_not_stored_as_a_whole(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    chunks = metadata.state_dict_metadata["output_layer.weight"].chunks
    gone = chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    as_foreign(checkpoint)
    opened = open_checkpoint(checkpoint)
    with pytest.raises(DamagedError, match=r"output_layer\.weight is not stored as a whole"):
        opened.read("output_layer.weight")
    rows = gone.offsets[0]
    assert opened.read("output_layer.weight", Region((0, 0), (rows, 24))).shape == (rows, 24)


def test_bad_requests(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    with pytest.raises(RequestError, match="no tensor nothing"):
        opened.read("nothing")
    with pytest.raises(RequestError, match="does not lie in"):
        opened.read("output_layer.weight", Region((70, 0), (10, 24)))
    with pytest.raises(RequestError, match="no such folder"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="not a checkpoint"):
        open_checkpoint(tmp_path / "empty")
    as_foreign(checkpoint)
    (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(RequestError, match="zarr"):
        open_checkpoint(checkpoint)
    (checkpoint / "metadata.json").write_text("{")
    with pytest.raises(DamagedError, match=r"metadata\.json"):
        open_checkpoint(checkpoint)


def test_destination_exists(checkpoint: Path, source: InitialCheckpoint) -> None:
    before = verify(checkpoint)
    with pytest.raises(RequestError, match="exists already"):
        copy_checkpoint(source, checkpoint)
    assert verify(checkpoint) == before


def failing(kind: str, tensor: torch.Tensor) -> Any:
    infos = {"x": TensorInfo((4, 6), torch.float32)}
    whole = SourceRegion("x", Region((0, 0), (4, 6)), lambda part: tensor[part.slices])
    half = SourceRegion("x", Region((0, 0), (2, 6)), lambda part: tensor[part.slices])

    def raises(part: Region) -> torch.Tensor:
        raise DamagedError("cannot be read")

    broken = SourceRegion("x", Region((2, 0), (2, 6)), raises)
    return infos, {
        "a.distcp": {"gap": [half], "twice": [half, half], "source": [half, broken], "more": [whole, half]}[kind]
    }


@pytest.mark.parametrize("kind", ["gap", "twice", "source", "more"])
def test_nothing_is_left_when_writing_fails(tmp_path: Path, kind: str) -> None:
    infos, shards = failing(kind, torch.randn(4, 6))
    with pytest.raises(FlmError, match=r"x: |cannot be read"):
        write_checkpoint(tmp_path / "a", infos, shards, Manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_request_error(tmp_path: Path, source: InitialCheckpoint) -> None:
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, before[1]))
        with pytest.raises(RequestError, match=r"__0_0\.distcp: cannot be written: File too large"):
            copy_checkpoint(source, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_rows_wider_than_a_block_is_that_of_their_parts() -> None:
    values = torch.randn(2, 70_000, generator=torch.Generator().manual_seed(4))
    shape = tuple(values.shape)
    parts = [Region((0, start), (2, size)) for start, size in ((0, 40_000), (40_000, 30_000))]
    shares = [partial_hash(shape, part, values[part.slices]) for part in parts]
    assert sum(shares) % 2**64 == partial_hash(shape, Region.whole(shape), values)
