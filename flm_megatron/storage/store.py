"""Objects of a store: what is there, ranges of bytes, whole objects. Every request is bounded and tried again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_megatron.errors import RequestError
from flm_megatron.storage import retry
from flm_megatron.storage.retry import Incomplete, retrying
from flm_megatron.url import refuse_secret, shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

S3 = ("s3", "s3a")
PART = 32 * 2**20
"""Bytes of a request that is one of many for an object."""
LONG_LIST = 2**30
"""As many bytes as a list may take the time of."""
PACKAGES = {
    "s3": 'pip install "flm_megatron[storage]"', "s3a": 'pip install "flm_megatron[storage]"',
    "gs": "pip install gcsfs", "gcs": "pip install gcsfs",
    "az": "pip install adlfs", "abfs": "pip install adlfs", "abfss": "pip install adlfs",
}  # fmt: skip


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the store has it now. `version` changes when it is written again: its ETag or the like."""

    url: str
    size: int
    version: str


def require_url(url: str, what: str) -> None:
    """Check that `url` holds no secret and that its kind of store can be opened here; asks the store nothing.

    Raises:
        RequestError: as `refuse_secret` and `filesystem`.
    """
    refuse_secret(url, what)
    filesystem(url)


def filesystem(url: str) -> AbstractFileSystem:
    """The fsspec file system of a URL, without a cache of lists; one for all that ask in a process.

    Raises:
        RequestError: its scheme is not known, or a package is missing; says which.
    """
    import fsspec

    scheme = _scheme(url)
    try:
        if scheme in S3:
            return _s3()
        found: AbstractFileSystem = fsspec.filesystem(scheme, use_listings_cache=False)
        return found
    except ImportError:
        install = PACKAGES.get(scheme, "install the package that fsspec names for it")
        raise RequestError(f"{shown(url)} needs a package that is not installed: {install}") from None
    except ValueError:
        raise RequestError(
            f"{shown(url)}: {scheme}:// is no kind of store that fsspec knows: give s3://, gs:// or az://"
        ) from None


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _s3() -> AbstractFileSystem:
    """s3fs with one try a request, as `retrying` counts them, and bounded waits."""
    import s3fs

    waits = {"connect_timeout": retry.CONNECT_TIMEOUT_S, "read_timeout": retry.REQUEST_TIMEOUT_S}
    found: AbstractFileSystem = s3fs.S3FileSystem(
        config_kwargs={**waits, "retries": {"total_max_attempts": 1}}, use_listings_cache=False
    )
    found.retries = 1
    return found


def _ask(url: str, method: str, *arguments: object, size: int = 0, **options: object) -> Any:
    """Call a method of the URL's file system, which ends within seconds that `size`, the bytes it moves, allows.

    The libraries' own limits do not hold while a request is being sent.
    """
    files = filesystem(url)
    if files.async_impl:
        options["timeout"] = retry.REQUEST_TIMEOUT_S + size / retry.SLOWEST_BYTES_PER_S
    return getattr(files, method)(*arguments, **options)


def info(url: str) -> ObjectInfo | None:
    """What is at a URL; none if there is no object. Raises RequestError as `retrying`."""
    try:
        found = retrying(lambda: _ask(url, "info", url), url, "read")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if found.get("type") == "directory":
        return None
    return ObjectInfo(url, int(found["size"]), _version(found))


def _version(found: dict[str, object]) -> str:
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "checksum",
        "generation",
        "LastModified",
        "mtime",
        "created",
        "last_modified",
    ):
        if found.get(key):
            return str(found[key]).strip('"')
    return str(found.get("size"))


def below(root: str) -> list[ObjectInfo]:
    """Every object below a folder at any depth, by one listing (a request for each 1,000). Raises RequestError."""
    try:
        found = retrying(lambda: _ask(root, "find", root, size=LONG_LIST, detail=True), root, "listed")
    except (FileNotFoundError, NotADirectoryError):
        return []
    start = str(filesystem(root)._strip_protocol(root))
    return [
        ObjectInfo(root.rstrip("/") + path.removeprefix(start), int(item["size"]), _version(item))
        for path, item in found.items()
    ]


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object. Raises FileNotFoundError; RequestError as `retrying`."""

    def once() -> bytes:
        data: bytes = _ask(url, "cat_file", url, size=stop - start, start=start, end=stop)
        if len(data) != stop - start:
            raise Incomplete(f"{len(data)} bytes came of {stop - start}")
        return data

    return retrying(once, url, "read") if stop > start else b""


def read(url: str) -> bytes:
    """All of a small object. Raises FileNotFoundError; RequestError as `retrying`."""

    def once() -> bytes:
        found = _ask(url, "info", url)
        data: bytes = _ask(url, "cat_file", url, size=found["size"])
        if len(data) != found["size"]:
            raise Incomplete(f"{len(data)} bytes came of {found['size']}")
        return data

    return retrying(once, url, "read")


def write(url: str, data: bytes) -> None:
    """Write an object as a whole, over what is there. Raises RequestError as `retrying`."""
    retrying(lambda: _ask(url, "pipe_file", url, data, size=len(data)), url, "written")


def create(url: str, data: bytes) -> bool:
    """Write an object unless there is one, which the store decides; whether it is there now with these bytes.

    Raises RequestError as `retrying`.
    """
    try:
        retrying(lambda: _ask(url, "pipe_file", url, data, mode="create"), url, "written")
    except FileExistsError:  # perhaps by a try of ours whose answer was lost
        try:
            return read(url) == data
        except FileNotFoundError:
            return False
    return True


def is_s3(url: str) -> bool:
    """Whether it speaks S3's own requests."""
    return _scheme(url) in S3


def begin_upload(url: str) -> str:
    """Begin a multipart upload of S3; returns its id. One try, as those below."""
    return str(_s3_call(url, "create_multipart_upload")["UploadId"])


def send_part(url: str, upload_id: str, number: int, data: bytes) -> str:
    """Send a part, the first of which has number 1; returns its tag."""
    return str(_s3_call(url, "upload_part", len(data), UploadId=upload_id, PartNumber=number, Body=data)["ETag"])


def complete_upload(url: str, upload_id: str, tags: list[str]) -> None:
    """Make the object of all parts, by their tags in order; nothing if an earlier try did though it failed."""
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    try:
        _s3_call(url, "complete_multipart_upload", LONG_LIST, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except FileNotFoundError:
        if info(url) is None:
            raise


def abort_upload(url: str, upload_id: str) -> None:
    """Have the store forget an upload and its parts."""
    _s3_call(url, "abort_multipart_upload", UploadId=upload_id)


def _s3_call(url: str, method: str, size: int = 0, **arguments: object) -> dict[str, object]:
    bucket, key, _ = filesystem(url).split_path(url)
    found: dict[str, object] = _ask(url, "call_s3", method, size=size, Bucket=bucket, Key=key, **arguments)
    return found


def upload(path: Path, url: str) -> None:
    """Write a file, which others may append to meanwhile, as an object; a large one in parts.

    Raises:
        RequestError: as `retrying`.
        FileNotFoundError: the file is not there.
    """

    def once() -> None:
        options = {"chunksize": PART} if is_s3(url) else {}
        _ask(url, "put_file", str(path), url, size=path.stat().st_size, **options)

    retrying(once, url, "written")


def download(found: ObjectInfo, path: Path) -> None:
    """Write an object as a file of this machine, in ranges; it is not there as a whole until this returns.

    Raises:
        RequestError: as `retrying`; or the object changed meanwhile.
    """
    with path.open("wb") as out:
        for start in range(0, found.size, PART):
            out.write(read_range(found.url, start, min(start + PART, found.size)))
        out.flush()
        os.fsync(out.fileno())
    require_unchanged(found)


def require_unchanged(found: ObjectInfo) -> None:
    """Check that an object is still what it was: what was read since then is of that version.

    Raises:
        RequestError: it was written again or removed.
    """
    if info(found.url) != found:
        raise RequestError(
            f"{shown(found.url)} changed while it was read: write new data under a new name, and start again"
        )


def remove(url: str) -> None:
    """Delete an object; nothing if it is not there. Raises RequestError as `retrying`."""
    try:
        retrying(lambda: _ask(url, "rm_file", url), url, "removed")
    except FileNotFoundError:
        return
