"""Whether a tokenizer gives back the texts that a dataset is built from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flm_megatron.data.tokenizer import Tokenizer

TRIED = 20
"""Documents that are tried, from the first on."""
LONGEST = 10_000
"""Characters of each that are tried."""


@dataclass
class Losses:
    """How many of the first documents that passed through `watch` do not come back from their ids."""

    tokenizer: Tokenizer
    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def watch(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents, unchanged."""
        for document in documents:
            if self.tried < TRIED:
                self.tried += 1
                text = document[:LONGEST]
                if not self.tokenizer.gives_back(text):
                    self.lost.append(text)
            yield document

    def line(self) -> str | None:
        """One line for the user; none if every text came back."""
        if not self.lost:
            return None
        text = self.lost[0]
        back = self.tokenizer.decode(self.tokenizer.encode(text))
        at = next((n for n, (one, two) in enumerate(zip(text, back, strict=False)) if one != two), len(back))
        return (
            f"WARNING: tokenizer {self.tokenizer.path} does not give back {len(self.lost)} of the first {self.tried} "
            f"documents: {text[at : at + 12]!r} becomes {back[at : at + 12]!r}; bits per byte count what it loses too"
        )
