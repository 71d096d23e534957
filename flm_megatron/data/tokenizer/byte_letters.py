"""The letters that stand for bytes in byte-level vocabularies."""

from __future__ import annotations


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it prints, else one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256))
    return [chr(byte) if byte in prints else next(others) for byte in range(256)]
