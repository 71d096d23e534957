"""The text of `strace -f -y -xx` as events.

A call's effect counts from its end, which is when the next one of its process can rely on it; what a sync covers, from
its beginning. All processes are stopped by one tracer, so that the order of the lines is one that the disk saw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tests.crash.events import Event, MakeFolder, Open, Remove, Rename, Resize, SyncBegins, SyncEnds, Write

LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(.*)")
BEGIN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")
NEVER = {"link", "linkat", "symlink", "symlinkat", "fallocate", "splice", "sync", "syncfs", "io_uring_setup"}
CLONES = {"clone", "clone3", "fork", "vfork"}


@dataclass(frozen=True)
class Call:
    """One system call; `begins` for the beginning of one that another process interrupted in the text."""

    process: int
    name: str
    arguments: str
    result: int
    begins: bool = False


def read_calls(lines: Iterable[str], root: str) -> Iterator[Call]:
    """The calls that have to do with files under `root`, and those that make processes, joined where they are split."""
    wanted, waiting = encoded(root), dict[int, tuple[str, str]]()
    for line in lines:
        if match := BEGIN.match(line):
            process, name, arguments = int(match[1]), match[2], match[3]
            waiting[process] = (name, arguments)
            if "sync" in name and wanted in arguments:
                yield Call(process, name, arguments, 0, begins=True)
            continue
        if match := RESUMED.match(line):
            process = int(match[1])
            name, arguments = waiting.pop(process)
            line = f"{process} {name}({arguments}{match[3]}"
        match = LINE.match(line.rstrip("\n"))
        if match and (wanted in line or match[2] in CLONES):
            result = int(match[4]) if re.fullmatch(r"-?\d+", match[4]) else 0
            if result >= 0:
                yield Call(int(match[1]), match[2], match[3], result)


def encoded(text: str) -> str:
    """As -xx writes it."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def decoded(text: str) -> bytes:
    """The bytes that -xx wrote."""
    return bytes.fromhex(text.replace("\\x", ""))


@dataclass
class Position:
    """An open file description's place; none if it appends."""

    offset: int | None


@dataclass
class Calls:
    """Turns calls into `events`."""

    root: str
    events: list[Event] = field(default_factory=list)
    _positions: dict[int, dict[int, Position]] = field(default_factory=dict)
    _syncs: dict[int, int] = field(default_factory=dict)
    _number: int = 0

    def take(self, call: Call) -> None:
        """One more call. Raises ValueError for one that changes files in a way that is not known here."""
        if call.name in NEVER:
            raise ValueError(f"{call.name}({call.arguments}) cannot be played back")
        handler: Callable[[Call], None] | None = getattr(self, f"_{HANDLERS.get(call.name, call.name)}", None)
        if handler is None:
            raise ValueError(f"{call.name} is not known")
        handler(call)

    def _table(self, process: int) -> dict[int, Position]:
        return self._positions.setdefault(process, {})

    def _inside(self, path: str) -> str | None:
        if path == self.root:
            return ""
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else None

    def _descriptors(self, call: Call) -> list[tuple[str, str | None]]:
        """Each descriptor in the arguments with its path under the root."""
        return [(number, self._inside(decoded(path).decode())) for number, path in DESCRIPTOR.findall(call.arguments)]

    def _paths(self, call: Call) -> list[str | None]:
        """The path arguments, made absolute with the folder descriptor before each."""
        found, start = [], 0
        for match in TEXT.finditer(call.arguments):
            path = decoded(match[1]).decode()
            before = DESCRIPTOR.search(call.arguments, start, match.start())
            if not path.startswith("/") and before:
                path = f"{decoded(before[2]).decode()}/{path}"
            found.append(self._inside(path))
            start = match.end()
        return found

    def _openat(self, call: Call) -> None:
        (path,) = self._paths(call)
        if path is None or "O_PATH" in call.arguments or "O_TMPFILE" in call.arguments:
            return  # nothing of a file without a name can stay
        if "O_SYNC" in call.arguments or "O_DSYNC" in call.arguments:
            raise ValueError(f"{path} is opened with {call.arguments}, which is not played back")
        if "O_WRONLY" in call.arguments or "O_RDWR" in call.arguments:
            self.events.append(Open(path, "O_TRUNC" in call.arguments))
        self._table(call.process)[call.result] = Position(None if "O_APPEND" in call.arguments else 0)

    def _write(self, call: Call) -> None:
        number, path = self._descriptors(call)[0]
        if path is None:
            return
        data = b"".join(decoded(match[1]) for match in TEXT.finditer(call.arguments, call.arguments.index(">")))
        position = self._table(call.process)[int(number)]
        self._add_write(path, position, data[: call.result])

    def _add_write(self, path: str, position: Position, data: bytes) -> None:
        self.events.append(Write(path, position.offset, data))
        if position.offset is not None:
            position.offset += len(data)

    def _pwrite64(self, call: Call) -> None:
        _, path = self._descriptors(call)[0]
        if path is not None:
            data = b"".join(decoded(match[1]) for match in TEXT.finditer(call.arguments, call.arguments.index(">")))
            self.events.append(Write(path, int(call.arguments.rsplit(", ", 1)[1]), data[: call.result]))

    def _sendfile(self, call: Call) -> None:
        """A copy from a file that is not changed, read where it lies."""
        (number, path), (_, _) = self._descriptors(call)
        if path is None or not call.result:
            return
        source, start = (
            decoded(DESCRIPTOR.findall(call.arguments)[1][1]).decode(),
            re.search(r"\[(\d+)\]", call.arguments),
        )
        if start is None or self._inside(source) is not None:
            raise ValueError(f"sendfile({call.arguments}) is not played back")
        with open(source, "rb") as file:
            file.seek(int(start[1]))
            self._add_write(path, self._table(call.process)[int(number)], file.read(call.result))

    def _lseek(self, call: Call) -> None:
        ((number, path),) = self._descriptors(call)
        position = self._table(call.process).get(int(number))
        if path is not None and position is not None and position.offset is not None:
            position.offset = call.result

    def _fsync(self, call: Call) -> None:
        """Begins where the call does; a call on one line begins and ends there."""
        _, path = self._descriptors(call)[0]
        if path is None:
            return
        if call.process not in self._syncs:
            self._number += 1
            self._syncs[call.process] = self._number
            self.events.append(SyncBegins(path, self._number))
        if not call.begins:
            self.events.append(SyncEnds(self._syncs.pop(call.process)))

    def _rename(self, call: Call) -> None:
        source, target = self._paths(call)
        if (source is None) != (target is None):
            raise ValueError(f"{call.arguments} leaves the folder that is recorded")
        if source is not None and target is not None:
            self.events.append(Rename(source, target))

    def _mkdir(self, call: Call) -> None:
        (path,) = self._paths(call)
        if path is not None:
            self.events.append(MakeFolder(path))

    def _unlink(self, call: Call) -> None:
        (path,) = self._paths(call)
        if path is not None:
            self.events.append(Remove(path))

    def _truncate(self, call: Call) -> None:
        paths = self._paths(call) or [path for _, path in self._descriptors(call)]
        if paths[0] is not None:
            self.events.append(Resize(paths[0], int(call.arguments.rsplit(", ", 1)[1])))

    def _mmap(self, call: Call) -> None:
        if (
            "MAP_SHARED" in call.arguments
            and "PROT_WRITE" in call.arguments
            and self._descriptors(call)[0][1] is not None
        ):
            raise ValueError(f"mmap({call.arguments}): writing through a memory map is not played back")

    def _dup(self, call: Call) -> None:
        number, _ = self._descriptors(call)[0]
        if int(number) in self._table(call.process) and ("F_DUPFD" in call.arguments or call.name != "fcntl"):
            self._table(call.process)[call.result] = self._table(call.process)[int(number)]

    def _close(self, call: Call) -> None:
        number, _ = self._descriptors(call)[0]
        self._table(call.process).pop(int(number), None)

    def _clone(self, call: Call) -> None:
        """A thread has the table of its process, a process a copy of its parent's."""
        table = self._table(call.process)
        self._positions[call.result] = table if "CLONE_FILES" in call.arguments else dict(table)


HANDLERS = {
    "open": "openat",
    "writev": "write",
    "pwritev": "pwrite64",
    "fdatasync": "fsync",
    "renameat": "rename",
    "renameat2": "rename",
    "mkdirat": "mkdir",
    "unlinkat": "unlink",
    "rmdir": "unlink",
    "ftruncate": "truncate",
    "dup2": "dup",
    "dup3": "dup",
    "fcntl": "dup",
    "clone3": "clone",
    "fork": "clone",
    "vfork": "clone",
}
