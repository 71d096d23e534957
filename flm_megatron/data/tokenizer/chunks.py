"""Long texts in pieces."""

from __future__ import annotations

from collections.abc import Iterator


def text_chunks(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut after the last line end where there is one."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
