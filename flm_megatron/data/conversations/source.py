"""One file of conversations as token ids, each cut to fit into a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.conversations.template import ChatTemplate, Piece
from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class EncodedConversation:
    """Ids and which of them are answers, [length] each, and the line of the file they come from."""

    ids: numpy.ndarray
    trained: numpy.ndarray
    line: int

    @property
    def length(self) -> int:
        """Positions in a sample: one less than ids, as the last is only predicted."""
        return len(self.ids) - 1


class ChatSource:
    """The conversations of one file that fit. `shortened` counts those that lost turns or the end of their only
    answer, `dropped` those whose first question alone does not fit."""

    def __init__(self, config: SourceConfig, template: ChatTemplate, sequence_length: int) -> None:
        """Read and encode all of the file.

        Raises:
            RequestError: as `read_conversations` and `ChatTemplate.pieces`, or nothing fits.
        """
        self.name = config.display_name
        self.conversations: list[EncodedConversation] = []
        self.shortened = self.dropped = 0
        for conversation in read_conversations(config.path):
            whole = template.pieces(conversation.messages, conversation.where)
            pieces = fitting(whole, sequence_length + 1)
            self.dropped += not pieces
            if pieces:
                self.shortened += pieces != whole
                self.conversations.append(_encoded(pieces, conversation.line))
        if not self.conversations:
            raise RequestError(
                f"{config.path}: no question fits into {sequence_length} tokens: raise data.sequence_length"
            )


def fitting(pieces: Sequence[Piece], capacity: int) -> list[Piece]:
    """The leading turns that fit into `capacity` ids.

    If not even one fits, the first with its answer cut off at the end; nothing if there is no room for any of its
    answer. `pieces` are pairs of question and answer.
    """
    used, kept = 0, 0
    for index in range(0, len(pieces), 2):
        used += len(pieces[index][0]) + len(pieces[index + 1][0])
        if used > capacity:
            break
        kept = index + 2
    if kept or not pieces:
        return list(pieces[:kept])
    (question, _), (answer, _) = pieces[:2]
    room = capacity - len(question)
    return [(question, False), (answer[:room], True)] if room > 0 else []


def _encoded(pieces: Sequence[Piece], line: int) -> EncodedConversation:
    ids = numpy.concatenate([numpy.array(ids, dtype=numpy.int32) for ids, _ in pieces])
    trained = numpy.concatenate([numpy.full(len(ids), answer) for ids, answer in pieces])
    return EncodedConversation(ids, trained, line)
