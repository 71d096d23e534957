"""Text for tests: the same bytes every time, whatever else changes in the project."""

from __future__ import annotations

import random

SYLLABLES = [first + second for first in "bdfgklmnprst" for second in "aeiou"]


def prose(documents: int) -> list[str]:
    """Made-up documents of 1 to 5 kB: words of one to three syllables, some of them very frequent, as in a language.

    Only `random()` is drawn from, which gives the same numbers in every version of Python.
    """
    draw = random.Random(0).random
    words = ["".join(SYLLABLES[int(draw() * 60)] for _ in range(1 + int(draw() * 3))) for _ in range(600)]

    def sentence() -> str:
        said = " ".join(words[int(draw() ** 3 * 600)] for _ in range(4 + int(draw() * 9)))
        return f"{said.capitalize()}.\n"

    return ["".join(sentence() for _ in range(25 + int(draw() * 100))) for _ in range(documents)]
