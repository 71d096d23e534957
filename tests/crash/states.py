"""Every state that a crash during recorded events may leave on the disk, up to a bound, each once.

- Killed: at each event, exactly what a program saw then.
- Power cut: what the file system promised is there; each later change of an entry is there or not, in every
  combination; each file with later writes holds one of `variants`. It is enough to look just before each sync ends,
  and at the very end: between two of these moments nothing becomes certain, so that a cut at an earlier event leaves a
  state in which the later changes are lost, which is among those of the later moment.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.crash.events import Event, SyncEnds, Write
from tests.crash.file_system import DataChange, Entries, File, FileSystem, Folder, applied, changed

MOST_CHANGES = 10
"""Changes of one folder's entries of which every subset is tried; of more, those of `_some_subsets`."""


@dataclass(frozen=True)
class Blob:
    """A file of a state."""

    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """Its identity."""
        return hashlib.sha1(self.data).digest()


@dataclass(frozen=True)
class Tree:
    """A folder of a state."""

    entries: dict[str, Blob | Tree]

    @cached_property
    def digest(self) -> bytes:
        """Its identity."""
        parts = [f"{name}\0".encode() + node.digest for name, node in sorted(self.entries.items())]
        return hashlib.sha1(b"folder" + b"\0".join(parts)).digest()

    def write(self, folder: Path) -> None:
        """Make the real folder."""
        folder.mkdir()
        for name, node in self.entries.items():
            if isinstance(node, Tree):
                node.write(folder / name)
            else:
                (folder / name).write_bytes(node.data)

    def find(self, path: str) -> Blob | Tree | None:
        """What lies at a path; none if nothing does."""
        node: Blob | Tree | None = self
        for name in path.split("/"):
            node = node.entries.get(name) if isinstance(node, Tree) else None
        return node


@dataclass(frozen=True)
class State:
    """What is left on the disk after a number of events; `finished` if these were all."""

    tree: Tree
    event: int
    power_cut: bool
    finished: bool


@dataclass
class Explorer:
    """Enumerates the states of a recording.

    `varied` says of which paths a power cut may take something (of the others everything stays); at one moment at most
    `limit` states are made, then a sample of them is. `watch` sees each event with the file system after it. `owed`
    says what must be there after so many events: a state is made again when more is owed than when it came up first.
    """

    folder: Path
    varied: Callable[[str], bool] = lambda path: True
    limit: int = 4096
    watch: Callable[[int, Event, FileSystem], None] | None = None
    owed: Callable[[int], Hashable] = lambda event: None
    seed: int = 1
    moments: int = 0
    sampled_moments: int = 0
    enumerated: int = 0
    _seen: set[tuple[bytes, Hashable, bool]] = field(default_factory=set)
    _trees: dict[tuple[int, int], Blob] = field(default_factory=dict)

    @property
    def different(self) -> int:
        """How many states were made, each counted once."""
        return len(self._seen)

    def states(self, events: Sequence[Event]) -> Iterator[State]:
        """All states, each once, in the order in which they first become possible."""
        system, number = FileSystem(self.folder), 0
        self._last = len(events)
        for number, event in enumerate(events, 1):
            if isinstance(event, SyncEnds):
                yield from self._power_cuts(system, number - 1)
            system.apply(event)
            if self.watch:
                self.watch(number, event, system)
            yield from self._new([self._seen_now(system.root)], number, power_cut=False)
        yield from self._power_cuts(system, number)

    def _new(self, trees: Iterable[Tree], number: int, power_cut: bool) -> Iterator[State]:
        for tree in trees:
            self.enumerated += 1
            key = (tree.digest, self.owed(number), number == self._last)
            if key not in self._seen:
                self._seen.add(key)
                yield State(tree, number, power_cut, number == self._last)

    def _power_cuts(self, system: FileSystem, number: int) -> Iterator[State]:
        yield from self._new(self.power_cuts(system), number, power_cut=True)

    def power_cuts(self, system: FileSystem) -> list[Tree]:
        """What a power cut now may leave."""
        self.moments += 1
        self._cut_short = False
        trees = self._folder_trees(system.root, "")
        self.sampled_moments += self._cut_short
        return trees

    def _seen_now(self, folder: Folder) -> Tree:
        """The folder as a program sees it."""
        return Tree(
            {
                name: self._seen_now(node) if isinstance(node, Folder) else self._blob(node)
                for name, node in folder.entries().items()
            }
        )

    def _blob(self, file: File) -> Blob:
        """What a program reads of a file; made once for each of its versions."""
        version = file.pending[-1][0] if file.pending else 0
        kept = self._trees.get((id(file), version))
        if kept is None or not file.pending:
            kept = self._trees[id(file), version] = Blob(file.content())
        return kept

    def _folder_trees(self, folder: Folder, path: str) -> list[Tree]:
        varied = self.varied(path)
        chosen = self._entry_choices(folder) if varied else [folder.entries()]
        options = [
            {name: self._node_trees(node, f"{path}/{name}" if path else name) for name, node in entries.items()}
            for entries in chosen
        ]
        return list({tree.digest: tree for tree in self._products(options)}.values())

    def _node_trees(self, node: File | Folder, path: str) -> list[Blob | Tree]:
        if isinstance(node, Folder):
            return list(self._folder_trees(node, path))
        if not node.pending or not self.varied(path):
            return [self._blob(node)]
        return [Blob(data) for data in variants(node.durable, [change for _, change in node.pending])]

    def _products(self, options: list[dict[str, list[Blob | Tree]]]) -> Iterator[Tree]:
        """Every combination of what the entries may be; a sample, with both ends of each list, if they are many."""
        counts = [_count(choice) for choice in options]
        if sum(counts) <= self.limit:
            for choice in options:
                for nodes in itertools.product(*choice.values()):
                    yield Tree(dict(zip(choice, nodes, strict=True)))
            return
        self._cut_short = True
        draw = random.Random(self.seed)
        for choice in options:
            yield Tree({name: nodes[0] for name, nodes in choice.items()})
            yield Tree({name: nodes[-1] for name, nodes in choice.items()})
        for choice in draw.choices(options, weights=counts, k=self.limit):
            yield Tree({name: draw.choice(nodes) for name, nodes in choice.items()})

    def _entry_choices(self, folder: Folder) -> list[Entries]:
        """What the entries of a folder may be."""
        changes = [change for _, change in folder.pending]
        if len(changes) > MOST_CHANGES:
            self._cut_short = True
            subsets = _some_subsets(len(changes), self.seed)
        else:
            subsets = itertools.product([False, True], repeat=len(changes))
        found = [changed(folder.durable, list(itertools.compress(changes, kept))) for kept in subsets]
        return list({tuple(sorted((name, id(node)) for name, node in each.items())): each for each in found}.values())


def _count(choice: dict[str, list[Blob | Tree]]) -> int:
    total = 1
    for nodes in choice.values():
        total *= len(nodes)
    return total


def _some_subsets(count: int, seed: int) -> Iterator[tuple[bool, ...]]:
    """Of many changes: the first n, the last n, all but one or two, one or two alone, and 500 at random."""
    for n in range(count + 1):
        yield tuple(i < n for i in range(count))
        yield tuple(i >= n for i in range(count))
    for pair in itertools.combinations_with_replacement(range(count), 2):
        yield tuple(i not in pair for i in range(count))
        yield tuple(i in pair for i in range(count))
    draw = random.Random(seed)
    for _ in range(500):
        yield tuple(draw.random() < 0.5 for _ in range(count))


def variants(durable: bytes, pending: list[DataChange]) -> list[bytes]:
    """What a file may hold after a power cut, from nothing new to all of it.

    None of the later writes; the first half of them, and half of the next; the last alone; all of them by size alone,
    with zeros for the bytes (a file system may record a size before the data); all.
    """
    half = len(pending) // 2
    torn = [*pending[:half], _first_half(pending[half])]
    everything = applied(durable, pending)
    sized = durable[: len(everything)] + bytes(max(0, len(everything) - len(durable)))
    found = [durable, applied(durable, torn), applied(durable, pending[-1:]), sized, everything]
    return list(dict.fromkeys(found))


def _first_half(change: DataChange) -> DataChange:
    if isinstance(change, Write):
        return Write(change.path, change.offset, change.data[: len(change.data) // 2])
    return change
