"""`flm generate` on every rank: one prompt, a file of prompts, or a chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.conversations.conversation import Message
from flm_megatron.data.conversations.template import TELE_FLM, ChatTemplate
from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.data.corpus.reading import JSONL
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import open_evaluated
from flm_megatron.evaluation.generation.generate import GenerationRequest
from flm_megatron.evaluation.generation.sampling import SamplingSettings
from flm_megatron.evaluation.generation.terminal import line_reader
from flm_megatron.evaluation.session import Session, hold_session


@dataclass(frozen=True)
class GenerateRequest:
    """The request of `flm generate`: prompts, or a chat if there are none.

    `stream` shows text as it comes; `lines` is the address that relays a chat's input, for processes started here.
    """

    checkpoint: Path
    prompts: list[str] = field(default_factory=list)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch: int = 1
    stream: bool = True
    out: Path | None = None
    as_json: bool = False
    system: str | None = None
    template: str = TELE_FLM
    lines: str | None = None
    tokenizer: Path | None = None
    precision: str | None = None
    vocab_size: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def of(self, index: int, prompt: list[int]) -> GenerationRequest:
        """One prompt's request."""
        return GenerationRequest(index, prompt, self.max_new_tokens, self.stop, self.sampling)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the field `prompt` of each JSON line (.jsonl), or each line of text that is not blank.

    Raises:
        RequestError: the file is missing, not UTF-8 or holds no prompt; the message names file and line.
    """
    found = list(Corpus([path], field="prompt").documents())
    if path.suffix not in JSONL:
        found = [line for text in found for line in text.splitlines() if line.strip()]
    if not found:
        raise RequestError(f"{path} has no prompt in it")
    return found


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; the end-of-document id for an empty one, as before a document in training."""
    return tokenizer.encode(prompt) or [tokenizer.eod]


def run_generation(request: GenerateRequest) -> int:
    """On every rank of the layout: load the checkpoint, then complete the prompts or chat. Returns 0."""
    evaluated = open_evaluated(request.checkpoint, request.tokenizer, request.vocab_size)
    lead = _complete if request.prompts else _chat
    return hold_session(
        evaluated, request.parallel, request.precision, request.batch, lambda session: lead(request, session)
    )


def _complete(request: GenerateRequest, session: Session) -> int:
    requests = [request.of(i, prompt_ids(session.tokenizer, text)) for i, text in enumerate(request.prompts)]
    if request.stream and not request.as_json and len(requests) == 1 and request.out is None:
        session.generate(requests, _show)
        print()
        return 0
    with _output(request.out) as out:
        for prompt, completion in zip(request.prompts, session.generate(requests), strict=True):
            if request.as_json:
                record = {
                    "prompt": prompt,
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "tokens": len(completion.ids),
                }
                print(json.dumps(record, ensure_ascii=False), file=out)
            else:
                print(completion.text, file=out)
    return 0


def _chat(request: GenerateRequest, session: Session) -> int:
    """Until the input ends: read a line and answer it, given the whole conversation."""
    template = ChatTemplate(request.template, session.tokenizer)
    messages: list[Message] = [{"role": "system", "content": request.system}] if request.system else []
    with line_reader(request.lines) as read:
        while (said := read("> ")) is not None:
            if not said.strip():
                continue
            messages.append({"role": "user", "content": said})
            asked = request.of(len(messages), template.prompt(messages))
            answer = session.generate([asked], _show if request.stream else None)[0]
            print("" if request.stream else answer.text, flush=True)
            messages.append({"role": "assistant", "content": answer.text})
    return 0


def _show(index: int, text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as out:
        yield out
