"""`manifest.json` on disk, and the files of a checkpoint held against the sizes and checksums in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from isal.isal_zlib import crc32

from flm_megatron.checkpoint.manifest import VERSION, FileEntry, Manifest
from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.json_text import parse_json
from flm_megatron.storage.path import ObjectPath, location
from flm_megatron.storage.reading import ObjectFile

MANIFEST = "manifest.json"
BLOCK = 8 * 2**20


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint folder; none if it has none.

    Raises:
        RequestError: written by a newer version of this program, or its disk does not answer.
        DamagedError: broken, or changed since it was written.
    """
    file = path / MANIFEST
    try:
        data = _read(file)
    except FileNotFoundError:
        return None
    saved = parse_json(data, str(file), DamagedError, name="a manifest")
    if not isinstance(saved, dict) or not isinstance(saved.get("version"), int):
        raise DamagedError(f"{file}: is not a manifest")
    if saved["version"] > VERSION:
        raise RequestError(
            f"{path} is of format version {saved['version']}, this program knows up to {VERSION}: update it"
        )
    if saved.pop("crc32", None) != _checksum(saved):
        raise DamagedError(f"{file}: was changed or damaged since it was written")
    return Manifest.from_json(saved, str(file))


def sealed(manifest: Manifest) -> dict[str, object]:
    """What the file holds: the record, and a checksum of it."""
    plain = manifest.to_json()
    return {**plain, "crc32": _checksum(plain)}


def manifest_text(manifest: Manifest) -> str:
    """The file's text."""
    return json.dumps(sealed(manifest), indent=1)


def verify(path: str | Path, quick: bool = False, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check the files of a checkpoint against its manifest: sizes, and checksums unless `quick`.

    `progress` is called with the number of bytes read since its last call. Returns the manifest.

    Raises:
        RequestError: its disk does not answer, or it is of a newer version.
        DamagedError: the manifest or a file is missing, of another size or changed; the message names it.
    """
    path = location(path)
    manifest = read_manifest(path)
    if manifest is None:
        raise DamagedError(f"{path}: has no {MANIFEST}, which is written last: it is incomplete or was changed")
    sizes = listed_sizes(path)
    for name, wanted in manifest.files.items():
        file = path / name
        if sizes.get(name) != wanted.size and (problem := size_problem(file, wanted)):
            raise DamagedError(problem)
        if not quick and (checksum := file_checksum(file, progress)) != wanted.crc32:
            raise DamagedError(f"{file}: checksum is {checksum} instead of {wanted.crc32}: its bytes have changed")
    return manifest


def listed_sizes(path: Path) -> dict[str, int]:
    """Sizes of the objects at a URL, by one list; none of a folder of this machine, whose files are asked one by one.

    A list may be old: what it does not show right is still asked for.
    """
    return {name: found.size for name, found in path.objects().items()} if isinstance(path, ObjectPath) else {}


def size_problem(file: Path, wanted: FileEntry) -> str | None:
    """What is wrong with the size of a file that a manifest lists so; none if it is right.

    Raises RequestError when the disk does not answer.
    """
    size = _size(file)
    if size is None:
        return f"{file} is missing"
    if size != wanted.size:
        return f"{file} has {size} bytes instead of {wanted.size}: truncated or overwritten"
    return None


def _size(file: Path) -> int | None:
    """Size in bytes; none where there is no such file. Raises RequestError when the disk does not answer."""
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError as error:
        raise read_error(file, error) from error


def entry(crc: int, size: int) -> FileEntry:
    """What a manifest holds of a file with this CRC-32 and size in bytes."""
    return FileEntry(size=size, crc32=f"{crc:08x}")


def file_entry(data: bytes) -> FileEntry:
    """What a manifest holds of a file with these bytes."""
    return entry(crc32(data), len(data))


def read_listed(path: Path, name: str, manifest: Manifest | None) -> bytes:
    """The bytes of a small file of the checkpoint at `path`, as listed in its manifest (any bytes without one).

    Raises DamagedError, naming the file, when it is missing or not as it was written; RequestError when its disk does
    not answer.
    """
    file = path / name
    try:
        data = _read(file)
    except FileNotFoundError as error:
        raise DamagedError(f"{file} is missing") from error
    wanted = manifest.files.get(name) if manifest else None
    if wanted is not None and (len(data), f"{crc32(data):08x}") != (wanted.size, wanted.crc32):
        raise DamagedError(f"{file}: its {len(data)} bytes are not the {wanted.size} that were written")
    return data


def _read(file: Path) -> bytes:
    """All of a file. Raises FileNotFoundError, and RequestError for all else that a disk may say."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(error)) from error
    except OSError as error:
        raise read_error(file, error) from error


def file_checksum(file: Path, progress: Callable[[int], None] | None = None) -> str:
    """CRC-32 of a file as 8 hex digits. Raises as `errors.read_error` when it cannot be read."""
    crc, block = 0, bytearray(BLOCK)
    try:
        with file.open("rb", buffering=0) as stream:
            if isinstance(stream, ObjectFile):
                stream.expect(stream.size)
            while count := stream.readinto(block):
                crc = crc32(memoryview(block)[:count], crc)
                if progress:
                    progress(count)
    except OSError as error:
        raise read_error(file, error) from error
    return f"{crc:08x}"


def _checksum(plain: dict[str, object]) -> str:
    return f"{crc32(json.dumps(plain, sort_keys=True).encode()):08x}"
