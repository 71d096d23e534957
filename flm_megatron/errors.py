"""Errors that a user sees as one line (or one per mistake), and the exit status of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# Controls, line ends of Unicode, and halves of surrogate pairs (bytes of a file name that are not UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` with every character that would break a line, or could not be printed, written as its escape."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def reason(error: Exception) -> str:
    """Kind of an error, and the first line of what it says."""
    said, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {said}"


class FlmError(Exception):
    """A failure that its message explains in one line; the program ends with `status`."""

    status = 1

    def __str__(self) -> str:
        """The message in one line, whatever names of files and values it quotes."""
        return one_line(super().__str__())


class RequestError(FlmError, ValueError):
    """A request that cannot be fulfilled: the message gives the values and how to fix them."""

    status = 2


class Mistakes(RequestError):
    """Several mistakes at once: a line that says how many, then one for each; a single one is one line."""

    def __init__(self, lines: Sequence[str], where: str | None = None) -> None:
        """`lines` are the mistakes, in order; `where` names the file that they are in, if it is known."""
        super().__init__(list(lines), where)
        self.lines, self.where = list(lines), where

    def __str__(self) -> str:
        """One line for one mistake; a heading and a line each for several."""
        where = f"{one_line(self.where)}: " if self.where else ""
        lines = [one_line(line) for line in self.lines]
        if len(lines) == 1:
            return where + lines[0]
        return "\n  ".join([f"{where or 'the run file has '}{len(lines)} mistakes", *lines])


class DamagedError(FlmError):
    """Stored data is damaged: the message names the file or tensor. `checkpoint` is its folder, if it is a
    checkpoint's."""

    def __init__(self, message: str, checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def read_error(path: Path, error: OSError) -> FlmError:
    """The error for a file of stored data at `path` that could not be read.

    A missing file is damage; anything else the system answers (no permission, too many open files, a failing disk) says
    nothing about the data: RequestError.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DamagedError(f"{path} is missing")
    return RequestError(f"{path}: cannot be read ({error.strerror or error}): see to its disk first")


class ProgramError(FlmError):
    """A process failed unexpectedly: the message is its traceback, with all lines."""

    def __str__(self) -> str:
        """The message unchanged."""
        return str(self.args[0])


ERRORS = {kind.__name__: kind for kind in (FlmError, RequestError, DamagedError)}
"""Kinds of errors by name, for errors that come from other processes."""


def refuse_together(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks, then raise Mistakes with everything that they refuse."""
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except Mistakes as error:
            lines += error.lines
        except RequestError as error:
            lines.append(str(error))
    if lines:
        raise Mistakes(lines)
