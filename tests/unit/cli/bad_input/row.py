"""One bad input of the command line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """`arguments` of `flm` as they are typed, in the folder that `scene.make_scene` makes; `words` of the answer.

    The answer is one line, or with `mistakes` a line that says how many there are and one for each.
    """

    arguments: str
    words: str
    status: int = 2
    mistakes: int = 1

    def typed(self) -> list[str]:
        """The arguments, one by one; `\\x00`, `\\n` and the like stand for themselves."""
        return [
            word.encode("latin-1", "backslashreplace").decode("unicode_escape") for word in shlex.split(self.arguments)
        ]

    @property
    def lines(self) -> int:
        """Lines of the answer."""
        return 1 if self.mistakes == 1 else self.mistakes + 1


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Kind and size of everything in a folder, by its path."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path.relative_to(folder).as_posix()] = (status.st_mode, 0 if path.is_dir() else status.st_size)
    return found
