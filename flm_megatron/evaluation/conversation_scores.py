"""Scores of conversations by a checkpoint, for screening: loss of the answers, difficulty, hidden states."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.conversations.screening import Score
from flm_megatron.data.conversations.source import fitting
from flm_megatron.data.conversations.template import ChatTemplate, Piece
from flm_megatron.evaluation.evaluated import open_evaluated
from flm_megatron.evaluation.model import load_model
from flm_megatron.model.forward import Batch, forward, is_output_rank

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM

SMALLEST_LENGTH = 32
Row = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, by which checkpoint: `indices` among the conversations of all files of `pool`.

    `window` is the longest conversation in tokens, the checkpoint's sequence length if none; `out` is the JSON file
    that scores go to."""

    pool: Sequence[Path]
    indices: Sequence[int]
    checkpoint: Path
    out: Path
    template: str
    window: int | None
    batch: int
    tokenizer: Path | None
    precision: str | None
    vocab_size: int | None
    parallel: ParallelConfig


@dataclass(frozen=True)
class ScoredBatch(Batch):
    """A batch with a mask of the positions that hold a token [batch, sequence]."""

    valid: Tensor | None = None


def score(request: ScoreRequest) -> int:
    """On every rank of the layout: score the conversations; returns 0.

    Raises:
        RequestError: as `open_evaluated`, `read_conversations` and `ChatTemplate`.
    """
    evaluated = open_evaluated(request.checkpoint, request.tokenizer, request.vocab_size)
    template = ChatTemplate(request.template, evaluated.tokenizer)
    window = evaluated.window(request.window)
    conversations = [c for path in request.pool for c in read_conversations(path)]
    whole: dict[int, Row] = {}
    alone: dict[int, Row] = {}
    for index in request.indices:
        conversation = conversations[index]
        pieces = fitting(template.pieces(conversation.messages, conversation.where), window + 1)
        if pieces:
            whole[index] = _row(pieces)
            answers = [piece for piece in pieces if piece[1]]
            alone[index] = _row(fitting([([evaluated.tokenizer.eod], False), *_merged(answers)], window + 1))
    chunk = load_model(evaluated, request.parallel, request.precision)
    asked, unasked = (_measure(chunk, rows, request.batch) for rows in (whole, alone))
    if is_output_rank():
        scores = {
            index: {"loss": loss, "difficulty": math.exp(min(loss - unasked[index][0], 50.0)), "hidden": hidden}
            for index, (loss, hidden) in asked.items()
        }
        request.out.write_text(json.dumps(scores))
    return 0


def read_scores(path: Path) -> dict[int, Score]:
    """Scores by the number of the conversation in the pool."""
    return {int(index): Score(**values) for index, values in json.loads(path.read_text()).items()}


def _merged(answers: Sequence[Piece]) -> list[Piece]:
    return [([id for ids, _ in answers for id in ids], True)]


def _row(pieces: Sequence[Piece]) -> Row:
    return [id for ids, _ in pieces for id in ids], [answer for ids, answer in pieces for _ in ids]


def _measure(chunk: TeleFLM, rows: Mapping[int, Row], batch: int) -> dict[int, tuple[float, list[float]]]:
    """Mean loss of the answers and mean hidden state of each row, on the output rank."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (ids, _) in rows.items():
        length = max(SMALLEST_LENGTH, 2 ** math.ceil(math.log2(len(ids) - 1)))
        by_length[min(length, chunk.max_positions or length)].append(index)
    seen: list[Tensor] = []
    hook = chunk.decoder.register_forward_hook(lambda module, given, output: seen.append(output))
    found: dict[int, tuple[float, list[float]]] = {}
    try:
        for length, indices in by_length.items():
            groups = [indices[start : start + batch] for start in range(0, len(indices), batch)]
            batches = [_batch([rows[i] for i in group], batch, length) for group in groups]
            results = forward(chunk, batches, len(batches), lambda item, losses: _summary(item, losses, seen))
            for group, result in zip(groups, results, strict=False):
                found |= dict(zip(group, result, strict=False))
    finally:
        hook.remove()
    return found


def _summary(batch: Batch, losses: Tensor, seen: list[Tensor]) -> list[tuple[float, list[float]]]:
    """Loss and hidden state of each row; `seen` holds the last hidden states [sequence, batch, hidden]."""
    assert isinstance(batch, ScoredBatch) and batch.weights is not None and batch.valid is not None
    hidden = seen.pop().float().transpose(0, 1).cpu()
    seen.clear()
    loss = (losses.double().cpu() * batch.weights).sum(1) / batch.weights.sum(1).clamp(min=1)
    means = (hidden * batch.valid.unsqueeze(2)).sum(1) / batch.valid.sum(1, keepdim=True).clamp(min=1)
    return list(zip(loss.tolist(), means.tolist(), strict=True))


def _batch(rows: Sequence[Row], size: int, length: int) -> ScoredBatch:
    tokens, labels = torch.zeros(2, size, length, dtype=torch.long).unbind()
    weights, valid = torch.zeros(size, length, dtype=torch.float64), torch.zeros(size, length)
    for place, (ids, trained) in enumerate(rows):
        count = len(ids) - 1
        tokens[place, :count], labels[place, :count] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        weights[place, :count], valid[place, :count] = torch.tensor(trained[1:]).double(), 1.0
    return ScoredBatch(tokens, labels, weights, valid=valid)
