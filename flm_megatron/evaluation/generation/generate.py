"""Text generation with a key-value cache, by all processes of one replica of the model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.generation.sampling import Sampler, SamplingSettings
from flm_megatron.evaluation.perplexity.text_stream import TextStream
from flm_megatron.model.forward import Batch, forward, is_output_rank

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM

FinishReason = Literal["eod", "stop", "length"]
OnText = Callable[[int, str], None]
"""Called with a request's index and its new text."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt's ids (at least one) and how to continue it; `index` identifies the request and seeds its sampling."""

    index: int
    prompt: Sequence[int]
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        """Raise RequestError for a request that cannot be completed."""
        if not self.prompt or self.max_new_tokens < 1:
            raise RequestError(f"a prompt of {len(self.prompt)} ids and {self.max_new_tokens} new: both are at least 1")


@dataclass(frozen=True)
class Completion:
    """What was generated: text, ids (without the end-of-document id), and why it ended."""

    index: int
    text: str
    ids: list[int]
    finish_reason: FinishReason


def generate(
    chunk: TeleFLM, tokenizer: Tokenizer, requests: Sequence[GenerationRequest], on_text: OnText | None = None
) -> list[Completion]:
    """Complete a batch of requests; the same result on every process of the replica.

    Prompts of unequal length are padded on the left, which attention masks out; rotary positions are relative and
    learned ones count from there, so the padding does not change the result.

    Raises:
        RequestError: a request goes beyond the learned positions.
    """
    for request in requests:
        _check_positions(request, chunk.max_positions)
    rows = [_Row(request, tokenizer) for request in requests]
    longest = max(len(request.prompt) for request in requests)
    padding = torch.tensor([longest - len(request.prompt) for request in requests])
    tokens = torch.tensor([[tokenizer.eod] * (longest - len(r.prompt)) + list(r.prompt) for r in requests])
    with chunk.cached(longest + max(request.max_new_tokens for request in requests)) as cache:
        while True:
            hidden = _hidden(padding, cache.length, tokens.shape[1])
            outputs = forward(chunk, [Batch(tokens, hidden=hidden)], 1, _last_logits)
            logits: Tensor | list[Tensor] = outputs[0] if is_output_rank() else []
            chosen = _agreed([row.choose(of_row) for row, of_row in zip(rows, logits, strict=False)], len(rows))
            for row, token in zip(rows, chosen, strict=True):
                row.take(token, on_text)
            if all(row.reason for row in rows):
                return [row.completion() for row in rows]
            tokens = torch.tensor(chosen).unsqueeze(1)


def _check_positions(request: GenerationRequest, most: int | None) -> None:
    length = len(request.prompt) + request.max_new_tokens
    if most is not None and length > most:
        raise RequestError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones go beyond the model's "
            f"{most} learned positions: give fewer"
        )


class _Row:
    """One request in progress."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.request, self.eod, self.ends = request, tokenizer.eod, tokenizer.ends
        self.vocab_size = tokenizer.vocab_size
        self.ids: list[int] = []
        self.reason: FinishReason | None = None
        self._stream = TextStream(tokenizer, request.prompt, request.stop)
        self._sampler = Sampler(request.sampling, request.index)

    def choose(self, logits: Tensor) -> int:
        """The next id from logits [vocabulary]; for a sequence that has ended any id does."""
        if self.reason:
            return self.eod
        seen = torch.tensor([*self.request.prompt, *self.ids], device=logits.device)
        return self._sampler.choose(logits[: self.vocab_size], seen)  # no rows that only fill up an embedding

    def take(self, token: int, on_text: OnText | None) -> None:
        """Append an id, pass on its text, and check whether the sequence has ended."""
        if self.reason:
            return
        text = ""
        if token in self.ends:
            self.reason = "eod"
        else:
            self.ids.append(token)
            text = self._stream.feed(token)
            if self._stream.stopped:
                self.reason = "stop"
            elif len(self.ids) == self.request.max_new_tokens:
                self.reason = "length"
        if self.reason:
            text += self._stream.finish()
        if text and on_text:
            on_text(self.request.index, text)

    def completion(self) -> Completion:
        """The result, once the reason for the end is known."""
        assert self.reason
        return Completion(self.request.index, self._stream.text, self.ids, self.reason)


def _last_logits(batch: Batch, logits: Tensor) -> Tensor:
    return logits[:, -1].float()


def _hidden(padding: Tensor, start: int, positions: int) -> Tensor | None:
    """Mask [batch, 1, positions, start + positions] of the keys that are padding; none if there is none.

    A padding position sees itself, as a row without any scores has no softmax.
    """
    if not padding.any():
        return None
    keys = torch.arange(start + positions)
    is_padding = keys < padding[:, None, None, None]
    itself = keys == torch.arange(start, start + positions)[:, None]
    return is_padding & ~itself


def _agreed(chosen: list[int], count: int) -> list[int]:
    """The `count` ids that the output rank chose, on every process of the replica."""
    group = parallel_state.get_model_parallel_group()
    first_of_last_stage = dist.get_process_group_ranks(group)[-parallel_state.get_tensor_model_parallel_world_size()]
    assert is_output_rank() == (dist.get_rank() == first_of_last_stage)
    values = torch.tensor(chosen or [0] * count, device=current().torch_device)
    dist.broadcast(values, first_of_last_stage, group=group)
    return values.tolist()
