"""Files opened to be read in order, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from flm_megatron.errors import DamagedError, RequestError, one_line, read_error

if TYPE_CHECKING:
    import zstandard
    from _typeshed import WriteableBuffer

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SHORT = {".tgz": ".tar"}
READ_AHEAD = 2**20


def plain_name(path: Path) -> str:
    """The name of a file without the ending that says how it is compressed."""
    if path.suffix in SHORT:
        return path.stem + SHORT[path.suffix]
    return path.stem if path.suffix in COMPRESSED else path.name


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, out of what it is compressed by, in bounded memory.

    Raises:
        RequestError: `zstandard` is not installed, or the disk does not answer.
        DamagedError: it cannot be decompressed; also while it is read in the block.
    """
    how = _decompressor(path)
    try:
        with path.open("rb") as file:
            if how is None:
                yield file
                return
            with how(file) as stream:
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), READ_AHEAD))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DamagedError(one_line(f"{path} cannot be decompressed: {error}")) from None
    except OSError as error:
        if error.errno is None:  # bz2's own
            raise DamagedError(one_line(f"{path} cannot be decompressed: {error}")) from None
        raise read_error(path, error) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DamagedError(one_line(f"{path} cannot be decompressed: {error}")) from None
        raise


def _decompressor(path: Path) -> Callable[[BinaryIO], BinaryIO] | None:
    if path.suffix in (".gz", ".tgz"):
        return lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.suffix == ".bz2":
        return lambda file: cast(BinaryIO, bz2.BZ2File(file))
    if path.suffix == ".xz":
        return lambda file: cast(BinaryIO, lzma.LZMAFile(file))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise RequestError(f"{path} needs zstandard: pip install 'flm_megatron[data]'") from None
        return lambda file: cast(BinaryIO, _Zstandard(file, zstandard.ZstdDecompressor().decompressobj))
    return None


class _Zstandard(io.RawIOBase):
    """Frames one after another. (The library's own reader takes a file that was cut for one that ends.)"""

    def __init__(self, file: BinaryIO, begin: Callable[[], zstandard.ZstdDecompressionObj]) -> None:
        self._file, self._begin = file, begin
        self._frame = begin()
        self._inside, self._left = False, b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer with what comes next. Raises EOFError where the file ends within a frame."""
        view = memoryview(buffer)
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._begin(), False
            data = data or self._file.read(READ_AHEAD)
            if not data:
                if self._inside:
                    raise EOFError("the file ends within a frame")
                return 0
            self._inside = True
            self._left = self._frame.decompress(data)
            self._inside = not self._frame.eof
        taken = min(len(view), len(self._left))
        view[:taken], self._left = self._left[:taken], self._left[taken:]
        return taken
