"""A system that gives no file says nothing about the data in it: that is no damage, of whatever kind the file is."""

from __future__ import annotations

import errno
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flm_megatron.checkpoint.files import torch_file
from flm_megatron.checkpoint.files.manifest import file_checksum
from flm_megatron.checkpoint.hugging_face.config import read_json
from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in
from flm_megatron.data.corpus import verify as verification
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.errors import DamagedError, RequestError
from tests.support import data_cases

READERS: dict[str, Callable[[Path], object]] = {
    "x.pt": torch_file.read_torch_file,
    "common.pt": torch_file.load_torch_file,
    "x.safetensors": arrays_in,
    "shard": file_checksum,
    "config.json": read_json,
}


@contextmanager
def no_more_files() -> Iterator[None]:
    """While the block runs the system opens none (EMFILE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_checkpoint_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    path, read = tmp_path / name, READERS[name]
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    torch.save({"w": 1}, tmp_path / "common.pt")
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "shard").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    read(path)
    with no_more_files(), pytest.raises(RequestError, match=rf"{name}: cannot be read \(Too many open files\)"):
        read(path)
    path.unlink()
    with pytest.raises((DamagedError, RequestError), match=f"{name}.* is missing|is not a Hugging Face checkpoint"):
        read(path)


def test_an_archive_whose_reading_fails_halfway(tmp_path: Path) -> None:
    """zipfile says then that it is no archive, in the course of the error that the system gave."""
    hiding = zipfile.BadZipFile("File is not a zip file")
    hiding.__context__ = OSError(errno.ESTALE, "Stale file handle")
    assert isinstance(torch_file.archive_error(tmp_path, hiding, ""), RequestError)
    hiding.__context__ = OSError(errno.EINVAL, "Invalid argument")  # it looked before the beginning
    assert isinstance(torch_file.archive_error(tmp_path, hiding, "cut"), DamagedError)


def test_a_dataset_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_cases.datasets(tmp_path, {"a": 10})
    data, prefix = data_cases.config(tmp_path, {"a": 1}), tmp_path / "a"
    SampleStream(data, seed=5)
    with no_more_files(), pytest.raises(RequestError, match=r"a\.json: cannot be read"):
        read_description(prefix)
    description = read_description(prefix)
    monkeypatch.setattr("flm_megatron.data.corpus.description._parse", lambda path: description)
    with no_more_files(), pytest.raises(RequestError, match=r"a\.idx: cannot be read"):
        read_description(prefix)
    monkeypatch.setattr(verification, "verify_index", lambda prefix: description)
    with no_more_files(), pytest.raises(RequestError, match=r"a\.bin: cannot be read"):
        verification.verify_dataset(prefix)
