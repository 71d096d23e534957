"""A conversation as the ids of a prompt, in the Tele-FLM template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flm_megatron.data.tokenizer import Tokenizer

SYSTEM, USER, BOT = "<_system>", "<_user>", "<_bot>"


@dataclass
class Conversation:
    """What was said: pairs of a user's text and the ids of the model's answer, and the user's latest text.

    The template (Tele-FLM's released chat form) is `<_system>` text, then `<_user>` text `<_bot>` answer, repeated,
    each answer ended by the end-of-document id.
    """

    system: str | None = None
    turns: list[tuple[str, Sequence[int]]] = field(default_factory=list)

    def prompt(self, tokenizer: Tokenizer, user: str) -> list[int]:
        """Ids up to where the answer to `user` begins."""
        ids = tokenizer.encode(SYSTEM + self.system) if self.system else []
        for said, answer in self.turns:
            ids += [*tokenizer.encode(USER + said + BOT), *answer, tokenizer.eod]
        return ids + tokenizer.encode(USER + user + BOT)
