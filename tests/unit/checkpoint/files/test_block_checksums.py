"""Checksums of blocks: made while writing, and no changed byte is read without an error."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.checkpoint.files.block_checksums import (
    BLOCK,
    KEPT_BLOCKS,
    SUFFIX,
    BlockSums,
    CheckedFile,
    KeptBlocks,
    fragments,
)
from flm_megatron.checkpoint.files.manifest import manifest_text, verify
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.files.torch_file import read_torch_file
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.errors import DamagedError, RequestError
from tests.support.checkpoint_cases import Memory, flip

VALUES = {
    "decoder.layers.a": torch.randn(3, 700, 300, generator=torch.Generator().manual_seed(1)),
    "b": torch.arange(11.0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few blocks."""
    path = tmp_path_factory.mktemp("blocks") / "a"
    copy_checkpoint(Memory(VALUES), path, Manifest(position=StagePosition(1)), chunk_bytes=2**20)
    return path


def block_crcs(data: bytes) -> list[int]:
    """What the checksum file of `data` has to hold, by the standard library."""
    return [zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]


def test_every_block_of_a_shard_has_its_checksum(whole: Path) -> None:
    data = (whole / "__0_0.distcp").read_bytes()
    stored = (whole / f"__0_0.distcp{SUFFIX}").read_bytes()
    assert len(data) > 2 * BLOCK and len(data) % BLOCK
    assert memoryview(stored).cast("I").tolist() == block_crcs(data)
    entry = verify(whole).files[f"__0_0.distcp{SUFFIX}"]
    assert (entry.size, entry.crc32) == (len(stored), f"{zlib.crc32(stored):08x}")


@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=4))
def test_runs_of_any_length_add_up_to_blocks(lengths: list[int]) -> None:
    data = bytes(range(251)) * (sum(lengths) // 251 + 1)
    data = data[: sum(lengths)]
    sums, position = BlockSums(), 0
    for length in lengths:
        sums.add(fragments(memoryview(data)[position : position + length], position))
        position += length
    assert memoryview(sums.to_bytes()).cast("I").tolist() == block_crcs(data)


@given(st.data())
def test_a_read_is_right_or_refused(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(VALUES)))
    shape = VALUES[name].shape
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    region = Region(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))
    copy = tmp_path_factory.mktemp("flipped") / "a"
    shutil.copytree(whole, copy)
    files = sorted(file for file in copy.iterdir() if file.is_file())
    file = data.draw(st.sampled_from(files))
    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
    try:
        values = open_checkpoint(copy).read(name, region)
    except DamagedError as error:
        assert file.name in str(error)
    else:
        assert torch.equal(values, VALUES[name][region.slices])
        with pytest.raises(DamagedError):  # some other read finds it
            checkpoint = open_checkpoint(copy)
            for other in checkpoint.tensors:
                checkpoint.read(other)
    finally:
        shutil.rmtree(copy)


def test_a_checkpoint_without_block_checksums_is_held_against_its_records(whole: Path, tmp_path: Path) -> None:
    """As they were written before there were any."""
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    manifest = json.loads((old / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if name.endswith(SUFFIX)]:
        (old / name).unlink()
        del manifest["files"][name]
    (old / "manifest.json").write_text(manifest_text(Manifest.from_json(manifest)))
    assert torch.equal(open_checkpoint(old).read("b"), VALUES["b"])
    checkpoint = open_checkpoint(old)
    assert isinstance(checkpoint, TorchDistCheckpoint)
    chunk = checkpoint.chunks["decoder.layers.a"][0]
    flip(old / chunk.file, chunk.offset + chunk.length // 2)
    with pytest.raises(DamagedError, match=r"decoder\.layers\.a: .*have changed since"):
        checkpoint.read("decoder.layers.a", Region((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize("at", ["first record", "values"])
def test_a_disk_that_does_not_answer_is_no_damage(whole: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one start without permission, or with a failing mount, would have every checkpoint noted as damaged."""
    checkpoint = open_checkpoint(whole)
    if at == "values":
        checkpoint.read("decoder.layers.a", Region((0, 0, 0), (1, 1, 1)))

    def fail(*arguments: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(RequestError, match=r"distcp: cannot be read \(Stale file handle\): see to its disk first"):
        checkpoint.read("decoder.layers.a")


def test_a_shard_that_is_gone_is_damage(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    checkpoint = open_checkpoint(tmp_path / "copy")
    (tmp_path / "copy" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedError, match=r"b: .*__0_0\.distcp is missing"):
        checkpoint.read("b")


def test_checksums_of_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"holds 1 checksums for a file of 1048577 bytes"):
        CheckedFile(tmp_path / "x", BLOCK + 1, b"1234")


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    checked = CheckedFile(file, 4, zlib.crc32(b"abcd").to_bytes(4, "little"))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(DamagedError, match="ends before"):
            checked.read_into(descriptor, memoryview(bytearray(2)), 1)
    finally:
        os.close(descriptor)


def test_a_file_of_torch_save_is_held_against_its_own_checksums(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    values = torch.randn(64, 64)
    torch.save({"w": values}, file)
    assert torch.equal(read_torch_file(file)["w"].read(), values)
    flip(file, file.read_bytes().index(values.numpy().tobytes()) + 9000)
    array = read_torch_file(file)["w"]
    for region in (Region((0, 0), (1, 1)), Region((0, 3), (64, 1))):  # read in one run, and mapped
        with pytest.raises(DamagedError, match=r"x\.pt: .*have changed since"):
            array.read(region)


def test_reads_that_go_on_in_a_block_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files in turn, in pieces that end inside of blocks; what is read whole is not kept."""
    content = {name: os.urandom(3 * BLOCK + 100) for name in "ab"}
    asked, kept = list[tuple[int, int]](), KeptBlocks()
    preadv = os.preadv

    def note(fd: int, buffers: list[memoryview], position: int) -> int:
        asked.append((fd, position))
        return preadv(fd, buffers, position)

    files = {}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        sums = b"".join(crc.to_bytes(4, "little") for crc in block_crcs(data))
        fd = os.open(tmp_path / name, os.O_RDONLY)
        files[name] = fd, CheckedFile(tmp_path / name, len(data), sums, kept)
    monkeypatch.setattr(os, "preadv", note)
    piece = BLOCK // 2 + 7
    for start in range(0, 3 * BLOCK + 100, piece):
        for name, (fd, file) in files.items():
            out = bytearray(min(piece, 3 * BLOCK + 100 - start))
            file.read_into(fd, memoryview(out), start)
            assert out == content[name][start : start + piece]
    assert sorted(asked) == sorted((fd, block * BLOCK) for fd, _ in files.values() for block in range(4))
    for fd, _ in files.values():
        os.close(fd)


def test_the_block_that_was_not_used_for_longest_gives_way() -> None:
    kept, data = KeptBlocks(), np.zeros(1, np.uint8)
    for block in range(KEPT_BLOCKS):
        kept.keep(Path("x"), block, data)
    assert kept.get(Path("x"), 0) is data
    kept.keep(Path("y"), 0, data)
    held = [block for block in range(KEPT_BLOCKS) if kept.get(Path("x"), block) is not None]
    assert held == [0, *range(2, KEPT_BLOCKS)] and kept.get(Path("y"), 0) is data


@pytest.mark.parametrize("offset", [0, 8, 3 * mmap.ALLOCATIONGRANULARITY + 8, 5 * mmap.ALLOCATIONGRANULARITY])
def test_few_values_of_many_are_right_wherever_the_array_lies(tmp_path: Path, offset: int) -> None:
    """A mapping begins at a page; the array does not."""
    values = torch.arange(64 * 200, dtype=torch.int32).view(64, 200)
    (tmp_path / "x").write_bytes(bytes(range(256)) * (offset // 256) + bytes(offset % 256) + values.numpy().tobytes())
    array = StoredArray(tmp_path / "x", offset, (64, 200), torch.int32)
    for region in (Region((0, 3), (64, 2)), Region((60, 199), (4, 1)), Region((1, 0), (63, 1))):
        assert torch.equal(array.read(region), values[region.slices])


def test_a_disk_that_gives_less_than_was_asked_for_is_asked_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: preadv(fd, [buffers[0][:300_000]], position))
    assert torch.equal(open_checkpoint(whole).read("decoder.layers.a"), VALUES["decoder.layers.a"])
