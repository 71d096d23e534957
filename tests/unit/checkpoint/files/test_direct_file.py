"""Files filled by several threads, partly past the page cache."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files import direct_file
from flm_megatron.checkpoint.files.direct_file import PAGE, SMALLEST_DIRECT, DirectFile

SIZES = [1, PAGE - 1, SMALLEST_DIRECT, SMALLEST_DIRECT + 2 * PAGE + 77, 17 * 2**20 + 5, 3, 2 * SMALLEST_DIRECT, 4097]


@pytest.mark.parametrize("direct", [True, False], ids=["direct where the file system can", "through the page cache"])
@pytest.mark.parametrize("start", [0, 1, 64, PAGE])
def test_every_byte_lands_in_its_place(
    tmp_path: Path, start: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(direct_file, "_open_direct", lambda path: None)
    content = os.urandom(sum(SIZES))
    places = [sum(SIZES[:i]) for i in range(len(SIZES))]
    with DirectFile(tmp_path / "file") as file, ThreadPoolExecutor(3) as executor:
        pieces = [(memoryview(content)[p : p + n], start + p) for p, n in zip(places, SIZES, strict=True)]
        list(executor.map(lambda piece: file.write(*piece), reversed(pieces)))
    assert (tmp_path / "file").read_bytes() == bytes(start) + content


def test_large_pieces_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = direct_file._open_direct(_touched(tmp_path / "probe"))
    if probe is None:
        pytest.skip("the file system has no direct writes")
    os.close(probe)
    written: list[tuple[int, int]] = []
    before = direct_file.write_at

    def spy(fd: int, data: memoryview, position: int) -> None:
        written.append((fd, data.nbytes))
        before(fd, data, position)

    monkeypatch.setattr(direct_file, "write_at", spy)
    with DirectFile(tmp_path / "file") as file:
        file.write(memoryview(bytes(3 * SMALLEST_DIRECT)), 100)
        assert (file._direct, 3 * SMALLEST_DIRECT - PAGE) in written


def test_only_whole_pages_of_the_machine_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 64 KiB, as some Arm and POWER machines have."""
    page = 65536
    monkeypatch.setattr(direct_file, "PAGE", page)
    direct = os.open(_touched(tmp_path / "file"), os.O_WRONLY)
    monkeypatch.setattr(direct_file, "_open_direct", lambda path: direct)
    written: list[tuple[int, int]] = []
    before = direct_file.write_at

    def spy(fd: int, data: memoryview, position: int) -> None:
        if fd == direct:
            written.append((position, data.nbytes))
        before(fd, data, position)

    monkeypatch.setattr(direct_file, "write_at", spy)
    content = os.urandom(9 * 2**20 + 3 * 4096 + 5)
    with DirectFile(tmp_path / "file") as file:
        file.write(memoryview(content), 4096)
    assert (tmp_path / "file").read_bytes() == bytes(4096) + content
    assert len(written) == 2
    assert all(position % page == 0 and nbytes % page == 0 for position, nbytes in written)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_direct_writes_that_the_system_refuses(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of the place (EINVAL) is no failure, asked for once; any other error is one."""
    direct = os.open(_touched(tmp_path / "file"), os.O_WRONLY)
    monkeypatch.setattr(direct_file, "_open_direct", lambda path: direct)
    refused: list[int] = []
    before = direct_file.write_at

    def refuse(fd: int, data: memoryview, position: int) -> None:
        if fd == direct:
            refused.append(position)
            raise OSError(code, os.strerror(code))
        before(fd, data, position)

    monkeypatch.setattr(direct_file, "write_at", refuse)
    content = os.urandom(20 * 2**20 + 11)
    with DirectFile(tmp_path / "file") as file:
        if code == errno.EINVAL:
            file.write(memoryview(content), 1)
            assert (tmp_path / "file").read_bytes() == b"\0" + content
        else:
            with pytest.raises(OSError, match="No space"):
                file.write(memoryview(content), 1)
    assert len(refused) == 1


def test_a_failed_write_closes_the_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="stop"), DirectFile(tmp_path / "file") as file:
        file.write(memoryview(b"abc"), 0)
        raise ValueError("stop")
    assert len(os.listdir("/proc/self/fd")) == before


def _touched(path: Path) -> Path:
    path.touch()
    return path
