"""Writes a conversation as text for the model, and marks which ids are answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.data.conversations.conversation import Message
from flm_megatron.data.conversations.template_process import TemplateFailure, TemplateProcess
from flm_megatron.data.conversations.template_worker import Request, make_template, render
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from flm_megatron.data.tokenizer import Tokenizer

TELE_FLM = "tele-flm"
TELE_FLM_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '<_system>', 'user': '<_user>', 'assistant': '<_bot>'}[message.role] }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<_bot>{% endif %}"
)
# What stands for the ids of beginning and end in a rendered text: no text of a conversation may hold them.
BOS_MARK, EOS_MARK = "\x02bos\x03", "\x02eos\x03"
LONGEST_TEMPLATE = 2**20
PROBE = "\x02probe\x03"
Piece = tuple[list[int], bool]


class ChatTemplate:
    """A Jinja template with the variables of Hugging Face's: `messages`, `bos_token`, `eos_token`,
    `add_generation_prompt`, `raise_exception`.

    Tele-FLM's own is `<_system>` text, then `<_user>` text `<_bot>` answer, repeated; every answer ends with the
    tokenizer's end-of-document id, so that a model learns where to stop.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        """`template` is `tele-flm` or the path of a file.

        Raises:
            RequestError: no such file, or it is not a template.
        """
        self.name, self.tokenizer = template, tokenizer
        self._own = make_template(TELE_FLM_TEMPLATE) if template == TELE_FLM else None
        try:
            self._process = None if self._own else TemplateProcess(_read(template))
        except TemplateFailure as error:
            line = "" if error.line is None else f" line {error.line}"
            raise RequestError(f"{template}{line} is not a Jinja template: {error}") from None

    def pieces(self, messages: Sequence[Message], where: str) -> list[Piece]:
        """Ids of the conversation up to its last answer, in turns: what comes before an answer, the answer.

        The second of each pair says whether it is an answer, which is trained on.

        Raises:
            RequestError: the template drops an answer, or writes a conversation differently when it goes on; names
                `where` it stands.
        """
        if any("\x02" in message["content"] for message in messages):
            raise RequestError(f"{where} holds the control character U+0002, which marks the ends of texts")
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted: list[Request] = []
        for index in places:  # the probe tells an answer from the same letters elsewhere in the template
            wanted += [(index, True, None), (index + 1, False, None), (index + 1, False, PROBE)]
        texts = iter(self._render(messages, wanted, where))
        done, found = "", []
        for index, asked, answered, probe in zip(places, texts, texts, texts, strict=True):
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise RequestError(
                    f"{where}: template {self.name} writes the turns before an answer in another way after it"
                )
            content = messages[index]["content"]
            if PROBE not in probe or content.strip() not in answered[len(asked) :]:
                raise RequestError(f"{where}: template {self.name} drops the answer {content!r:.60}")
            found += [(self.encode(asked[len(done) :]), False), (self.encode(answered[len(asked) :]), True)]
            done = answered
        return found

    def prompt(self, messages: Sequence[Message], where: str = "conversation") -> list[int]:
        """Ids after which the model is to answer the last message. Raises RequestError as `pieces`."""
        return self.encode(self.render(messages, True, where))

    def render(self, messages: Sequence[Message], prompt: bool, where: str = "conversation") -> str:
        """The conversation as text, marks standing for ids; `prompt` opens the next answer. Raises RequestError."""
        return self._render(messages, [(len(messages), prompt, None)], where)[0]

    def _render(self, messages: Sequence[Message], requests: Sequence[Request], where: str) -> list[str]:
        """The texts of `requests`: our own template here, that of a file in its process."""
        from jinja2 import TemplateError

        marks = {"bos_token": BOS_MARK, "eos_token": EOS_MARK}
        try:
            if self._process is not None:
                return self._process.render(messages, requests, marks)
            assert self._own is not None
            return render(self._own, messages, requests, marks)
        except (TemplateError, TemplateFailure, KeyError, TypeError) as error:
            raise RequestError(f"{where}: template {self.name} cannot write it: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        ids: list[int] = []
        for number, ended in enumerate(text.split(EOS_MARK)):
            ids += [self.tokenizer.eod] if number else []
            for place, part in enumerate(ended.split(BOS_MARK)):
                ids += [self.tokenizer.bos] if place and self.tokenizer.bos >= 0 else []
                ids += self.tokenizer.encode(part)
        return ids


def _read(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LONGEST_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"template {path} cannot be read ({error}): give {TELE_FLM}, or a file") from None
    if len(text) > LONGEST_TEMPLATE:
        raise RequestError(f"template {path} has more than {LONGEST_TEMPLATE:,} characters: it is no chat template")
    return text
