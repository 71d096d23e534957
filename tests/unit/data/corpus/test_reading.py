"""Documents out of compressed files, tables, archives, patterns and saved datasets, each made by its own library."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import feather, ipc, parquet

from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.errors import DamagedError, FlmError, RequestError
from tests.support.object_store import ObjectStore

TEXTS = ["one\nline é", "日本", "three " * 50]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def documents(*inputs: Path | str, field: str = "text") -> list[str]:
    """Of these inputs."""
    return list(Corpus(inputs, field).documents())


def table() -> pyarrow.Table:
    """TEXTS in a column, with another."""
    return pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def tar_of(members: dict[str, bytes]) -> bytes:
    """An archive of these members, in order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_lines_and_texts(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](LINES) * 2)  # two streams, as `cat` joins them
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](TEXTS[1].encode()))
    assert documents(tmp_path / f"a.jsonl{ending}") == TEXTS * 2
    assert documents(tmp_path / f"b.txt{ending}") == [TEXTS[1]]
    assert Corpus([tmp_path / f"a.jsonl{ending}"]).size_bytes() is None


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_that_is_cut_or_none_is_damage(tmp_path: Path, ending: str) -> None:
    whole = COMPRESS[ending](LINES * 100)
    for data in (whole[: len(whole) // 2], b"plain text"):
        (tmp_path / f"a.jsonl{ending}").write_bytes(data)
        with pytest.raises(FlmError) as said:
            documents(tmp_path / f"a.jsonl{ending}")
        assert f"a.jsonl{ending}" in str(said.value) and "\n" not in str(said.value)


def write_stream(path: Path) -> None:
    """An Arrow stream."""
    with path.open("wb") as file, ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


def write_file(path: Path) -> None:
    """An Arrow file."""
    with path.open("wb") as file, ipc.new_file(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.parquet": lambda path: parquet.write_table(table(), path, row_group_size=2),
    "b.arrow": write_stream,
    "c.arrow": write_file,
    "d.feather": lambda path: feather.write_feather(table(), str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert documents(tmp_path / name) == TEXTS
    with pytest.raises(RequestError, match=r"has no field 'body'; its fields are 'id', 'text' \(choose with --field\)"):
        documents(tmp_path / name, field="body")
    with pytest.raises(RequestError, match="row 0: field 'id' is not text but int"):
        documents(tmp_path / name, field="id")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(FlmError) as said:
        assert documents(tmp_path / name) != TEXTS  # a stream may end after any batch
        raise DamagedError("")
    assert "\n" not in str(said.value)


def test_a_dataset_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": TEXTS * 4})
    saved.select([3, 1]).save_to_disk(tmp_path / "chosen")
    saved.save_to_disk(tmp_path / "several", num_shards=3)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "several") == TEXTS * 4 == documents(tmp_path / "splits" / "train")
    assert documents(tmp_path / "chosen") == [TEXTS[0], TEXTS[1]]
    with pytest.raises(RequestError, match=r"holds splits: name .*train or .*test"):
        documents(tmp_path / "splits")
    (tmp_path / "several" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DamagedError, match=r"data-00001-of-00003\.arrow, which .*state\.json names, is missing"):
        documents(tmp_path / "several")


def test_archives(tmp_path: Path) -> None:
    members = {
        "x/1.txt": b"first",
        "x/1.json": b'{"source": "somewhere"}',
        "x/2.json": b'{"text": "second"}',
        "x/2.jpg": b"\xff\xd8",
        "x/3.jsonl": LINES,
    }
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    (tmp_path / "b.tar.zst").write_bytes(COMPRESS[".zst"](tar_of(members)))
    (tmp_path / "c.tgz").write_bytes(gzip.compress(tar_of(members)))
    for name in ("a.tar", "b.tar.zst", "c.tgz"):
        assert documents(tmp_path / name) == ["first", "second", *TEXTS]
    for bad, words in (
        ({"x/2.json": b'{"body": "second"}'}, r"x/2\.json has no field 'text'"),
        ({"x/2.jpg": b""}, r"holds no text: neither \*\.txt"),
    ):
        (tmp_path / "bad.tar").write_bytes(tar_of(bad))
        with pytest.raises(RequestError, match=words):
            documents(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(tar_of(members)[:900])
    with pytest.raises(DamagedError, match="is no whole tar archive"):
        documents(tmp_path / "bad.tar")


def test_patterns_take_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert documents(tmp_path / "[ab].txt", tmp_path / "c.*") == ["a", "b", "c"]
    with pytest.raises(RequestError, match=r"input .*x\*\.txt is not there"):
        documents(tmp_path / "x*.txt")


def test_objects_and_patterns_of_them(object_store: ObjectStore) -> None:
    for name in ("b", "a"):
        object_store.put(f"web/{name}.jsonl.gz", gzip.compress(LINES))
    assert documents(object_store.url("web/a.jsonl.gz")) == TEXTS
    assert documents(object_store.url("web/*.jsonl.gz")) == TEXTS * 2
    with pytest.raises(RequestError, match=r"input s3://.*none\.txt is not there"):
        documents(object_store.url("none.txt"))
