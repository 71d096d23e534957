"""Where a source stands: which pass over its text, cut into samples of which length, and how many of these are taken.

A source is a line of ids: its documents in an order of their own, end to end. A pass cuts it into samples and takes
them in another order. When the sequence length changes in the middle of a pass, what that pass has not taken yet is
laid end to end again, in the order of the line, and cut at the new length; the passes after it are cut so from the
start. Every id of a pass is trained on once, whatever lengths it was taken in. This is arithmetic alone: no dataset is
opened here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cut:
    """A pass cut into samples of one length: all of its line, or what `parent` left after `taken` of its samples.

    The last sample of a remainder may have less text than the others, and is taken last.
    """

    epoch: int
    length: int
    parent: Cut | None = None
    taken: int = 0

    @property
    def label(self) -> str:
        """The pass in sample names: its number, and how often it was cut anew."""
        return f"{self.epoch}.{self.level}" if self.level else str(self.epoch)

    @property
    def level(self) -> int:
        """How often the pass was cut anew."""
        return 0 if self.parent is None else self.parent.level + 1

    def tokens(self, total: int) -> int:
        """Ids in its samples, of a source of `total` ids (the last of which is only a label)."""
        if self.parent is None:
            return (total - 1) // self.length * self.length
        return self.parent.tokens(total) - self.taken * self.parent.length

    def samples(self, total: int) -> int:
        """Samples in it, of a source of `total` ids."""
        return -(-self.tokens(total) // self.length)


@dataclass(frozen=True)
class Place:
    """The position in a source: `taken` of a cut's samples are taken, fewer than it has."""

    cut: Cut
    taken: int = 0

    def after(self, draws: int, total: int) -> Place:
        """The position after `draws` more samples, going from pass to pass; the source has `total` ids."""
        left = self.cut.samples(total) - self.taken
        if draws < left:
            return replace(self, taken=self.taken + draws)
        passes, taken = divmod(draws - left, Cut(0, self.cut.length).samples(total))
        return Place(Cut(self.cut.epoch + 1 + passes, self.cut.length), taken)

    def cut_at(self, length: int) -> Place:
        """The same position with the rest of the pass cut at `length`."""
        cut = self.cut
        if cut.length == length:
            return self
        if self.taken:
            return Place(Cut(cut.epoch, length, cut, self.taken))
        if cut.parent is not None and cut.parent.length == length:  # back to it before any other was taken
            return Place(cut.parent, cut.taken)
        return Place(replace(cut, length=length))
