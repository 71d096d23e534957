"""Special tokens in the text of a conversation: those that the template writes are tokens, those in what people said
are text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from flm_megatron.data.conversations.conversation import Message
from flm_megatron.data.tokenizer import Tokenizer

START, STOP = "\x02", "\x03"
"""What stands for an id in a text is its number between these: no text of a conversation may hold the first."""
_ID = re.compile(f"{START}(\\d+){STOP}")
_NAME = re.compile(f"{START}name(\\d+){STOP}")


class ControlTokens:
    """The special tokens of a tokenizer, as marks in rendered texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._by_id = {number: name for name, number in tokenizer.special_tokens.items()}

    @cached_property
    def _any_name(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._names)))

    def variables(self) -> dict[str, str]:
        """The template's variables `bos_token` and `eos_token`, as marks."""
        return {"bos_token": _mark(self.tokenizer.bos), "eos_token": _mark(self.tokenizer.eod)}

    def hidden(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the names of special tokens in them hidden from `marked`."""
        return [{**message, "content": self._hidden(message["content"])} for message in messages]

    def _hidden(self, text: str) -> str:
        if not self._names or START in text:
            return text
        return self._any_name.sub(lambda found: f"{START}name{self._names.index(found[0])}{STOP}", text)

    def marked(self, text: str) -> str:
        """A text that the template made of `hidden` messages: marks for special tokens, and what was hidden shown."""
        if not self._names:
            return text
        text = self._any_name.sub(lambda found: _mark(self.tokenizer.special_tokens[found[0]]), text)
        return _NAME.sub(lambda found: self._names[int(found[1])], text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks.

        The whole text goes to the library where it finds the same special tokens by their names; where what people
        said holds such a name too, or a marked id has no name, the parts between the marks go there one by one.
        """
        parts = _ID.split(text)
        texts, ids = parts[::2], [int(number) for number in parts[1::2]]
        if not ids:
            return self.tokenizer.encode(text)
        if all(number in self._by_id for number in ids) and not any(map(self._any_name.search, texts)):
            return self.tokenizer.encode_rendered(_ID.sub(lambda found: self._by_id[int(found[1])], text))
        found = self.tokenizer.encode(texts[0]) if texts[0] else []
        for number, part in zip(ids, texts[1:], strict=True):
            found += [number, *(self.tokenizer.encode(part) if part else [])]
        return found


def _mark(number: int) -> str:
    return f"{START}{number}{STOP}" if number >= 0 else ""
