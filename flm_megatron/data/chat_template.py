"""How a conversation is written as text for the model, and which parts of it are answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flm_megatron.data.conversations import Message
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
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name, self.tokenizer = template, tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(TELE_FLM_TEMPLATE if template == TELE_FLM else _read(template))
        except TemplateSyntaxError as error:
            raise RequestError(f"{template} line {error.lineno} is not a Jinja template: {error.message}") from None

    def pieces(self, messages: Sequence[Message], where: str) -> list[Piece]:
        """Ids of the conversation up to its last answer, in turns: what comes before an answer, the answer.

        The second of each pair says whether it is an answer, which is trained on.

        Raises:
            RequestError: the template drops an answer, or writes a conversation differently when it goes on; names
                `where` it stands.
        """
        if any("\x02" in message["content"] for message in messages):
            raise RequestError(f"{where} holds the control character U+0002, which marks the ends of texts")
        done, found = "", []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:index], True, where)
            answered = self.render(messages[: index + 1], False, where)
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise RequestError(
                    f"{where}: template {self.name} writes the turns before an answer in another way after it"
                )
            # The probe tells an answer from the same letters elsewhere in the template.
            probe = self.render([*messages[:index], {**message, "content": PROBE}], False, where)
            if PROBE not in probe or message["content"].strip() not in answered[len(asked) :]:
                raise RequestError(f"{where}: template {self.name} drops the answer {message['content']!r:.60}")
            found += [(self.encode(asked[len(done) :]), False), (self.encode(answered[len(asked) :]), True)]
            done = answered
        return found

    def prompt(self, messages: Sequence[Message], where: str = "conversation") -> list[int]:
        """Ids after which the model is to answer the last message. Raises RequestError as `pieces`."""
        return self.encode(self.render(messages, True, where))

    def render(self, messages: Sequence[Message], prompt: bool, where: str = "conversation") -> str:
        """The conversation as text, marks standing for ids; `prompt` opens the next answer. Raises RequestError."""
        from jinja2 import TemplateError

        marks = {"bos_token": BOS_MARK, "eos_token": EOS_MARK}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=prompt, **marks)
        except (TemplateError, KeyError, TypeError) as error:
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
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"template {path} cannot be read ({error}): give {TELE_FLM}, or a file") from None


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
