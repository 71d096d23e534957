"""Writes a conversation as text for the model, and marks which ids are answers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.data.conversations.control_tokens import START, STOP, ControlTokens
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
OF_TOKENIZER = "tokenizer"
NAMED = (TELE_FLM, OF_TOKENIZER)
"""Templates that are no files: Tele-FLM's, and the one beside the tokenizer."""
LONGEST_TEMPLATE = 2**20
PROBE = f"{START}probe{STOP}"
Piece = tuple[list[int], bool]


class ChatTemplate:
    """A Jinja template with the variables of Hugging Face's: `messages`, `bos_token`, `eos_token`,
    `add_generation_prompt`, `raise_exception`.

    Tele-FLM's own is `<_system>` text, then `<_user>` text `<_bot>` answer, repeated; every answer ends with the
    tokenizer's end-of-document id, so that a model learns where to stop.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        """`template` is `tele-flm`, `tokenizer` (the one beside the tokenizer) or the path of a file.

        Raises:
            RequestError: no such file, no template beside the tokenizer, or it is not a template.
        """
        self.name, self.tokenizer, self._tokens = template, tokenizer, ControlTokens(tokenizer)
        self._own = make_template(TELE_FLM_TEMPLATE) if template == TELE_FLM else None
        try:
            self._process = None if self._own else TemplateProcess(_text(template, tokenizer))
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
        if any(START in message["content"] for message in messages):
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

        hidden, marks = self._tokens.hidden(messages), self._tokens.variables()
        try:
            if self._process is not None:
                texts = self._process.render(hidden, requests, marks)
            else:
                assert self._own is not None
                texts = render(self._own, hidden, requests, marks)
            return [self._tokens.marked(text) for text in texts]
        except (TemplateError, TemplateFailure, KeyError, TypeError) as error:
            raise RequestError(f"{where}: template {self.name} cannot write it: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        return self._tokens.encode(text)


def template_fingerprint(template: str, tokenizer: str | None) -> str | None:
    """SHA-256 of a template's text, whatever it is called: what it makes of conversations follows from that.

    `tokenizer` is the path of the one that the template may lie beside; none where that is not known.

    Raises:
        RequestError: no such file, or no template beside the tokenizer.
    """
    from flm_megatron.data.tokenizer import open_tokenizer

    if template == OF_TOKENIZER:
        text = _text(template, open_tokenizer(tokenizer)) if tokenizer else None
    else:
        text = TELE_FLM_TEMPLATE if template == TELE_FLM else _read(template)
    return None if text is None else sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _text(template: str, tokenizer: Tokenizer) -> str:
    if template != OF_TOKENIZER:
        return _read(template)
    if tokenizer.chat_template is None:
        raise RequestError(
            f"template {template}: no chat template lies beside {tokenizer.path} (chat_template of "
            f"tokenizer_config.json, or chat_template.jinja): give {TELE_FLM}, or a file"
        )
    return tokenizer.chat_template


def _read(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LONGEST_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"template {path} cannot be read ({error}): give {', '.join(NAMED)}, or a file") from None
    if len(text) > LONGEST_TEMPLATE:
        raise RequestError(f"template {path} has more than {LONGEST_TEMPLATE:,} characters: it is no chat template")
    return text
