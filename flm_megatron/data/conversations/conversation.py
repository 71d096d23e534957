"""Conversations from JSON lines: `messages` with roles, or `prompt` and `response`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject, parse_json
from flm_megatron.storage.cache.whole import file_at

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, the number of their line, and the whole record of that line."""

    messages: list[Message]
    path: str
    line: int
    record: JsonObject = field(default_factory=dict, repr=False)

    @property
    def where(self) -> str:
        """File and line, for errors."""
        return f"{self.path} line {self.line}"

    def text(self) -> str:
        """All contents, a paragraph for each message."""
        return "\n\n".join(message["content"] for message in self.messages)


def read_conversations(path: str | Path) -> list[Conversation]:
    """All conversations of a JSONL file at a path or a URL, empty lines left out.

    Raises:
        RequestError: the file is missing, empty or not UTF-8, a line is not a conversation, has an unknown role, no
            answer, an empty answer or one without a question; names file and line.
    """
    found = list(_read(path))
    if not found:
        raise RequestError(f"{path} is empty: give one conversation on each line")
    return found


def _read(path: str | Path) -> Iterator[Conversation]:
    file = file_at(path)
    if file is None:
        raise RequestError(f"{path} is not there: give a file of JSON lines")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = _record(line, f"{path} line {number}")
                conversation = Conversation(_messages(record, f"{path} line {number}"), str(path), number, record)
                _check(conversation)
                yield conversation


def _record(line: bytes, where: str) -> JsonObject:
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise RequestError(f"{where} is not a JSON object but {type(record).__name__}")
    return record


def _messages(record: JsonObject, where: str) -> list[Message]:
    if "messages" not in record:
        parts = {"system": record.get("system"), "user": record.get("prompt"), "assistant": record.get("response")}
        if parts["user"] is None or parts["assistant"] is None:
            fields = ", ".join(map(repr, record)) or "none"
            raise RequestError(f"{where} has neither messages nor prompt and response; its fields are {fields}")
        given = [{"role": role, "content": text} for role, text in parts.items() if text is not None]
    else:
        given = record["messages"]
    if not isinstance(given, list):
        raise RequestError(f"{where}: messages is not a list but {type(given).__name__}")
    return [_message(message, f"{where} message {number}") for number, message in enumerate(given, 1)]


def _message(message: Json, where: str) -> Message:
    if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str):
        raise RequestError(f"{where} is not an object with a role and a text as content")
    if message["role"] not in ROLES:
        raise RequestError(f"{where} has the role {message['role']!r:.60}: roles are {', '.join(ROLES)}")
    if any("\ud800" <= character <= "\udfff" for character in message["content"]):
        raise RequestError(f"{where} has an escape of half a surrogate pair, which is not UTF-8")
    return {"role": message["role"], "content": message["content"]}


def _check(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles:
        raise RequestError(f"{conversation.where}: the conversation has no answer, a message of role assistant")
    if "user" not in roles[: roles.index("assistant")]:
        raise RequestError(f"{conversation.where}: the first answer has no question, a message of role user, before it")
    if "system" in roles[1:]:
        raise RequestError(
            f"{conversation.where}: message {roles.index('system', 1) + 1} is of role system, not the first"
        )
    for message in conversation.messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise RequestError(f"{conversation.where}: an answer is empty")
