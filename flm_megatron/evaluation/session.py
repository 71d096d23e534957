"""A loaded model that answers requests of rank 0 on all ranks: generation and scoring, over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.distributed.channels import broadcast, gathered
from flm_megatron.engine import parallel_state
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint
from flm_megatron.evaluation.generation.generate import Completion, GenerationRequest, OnText, generate
from flm_megatron.evaluation.model import load_model
from flm_megatron.evaluation.perplexity.scoring import Likelihood, ScoringRequest, score
from flm_megatron.model.forward import is_output_rank

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM

Request = TypeVar("Request", GenerationRequest, ScoringRequest)
Result = TypeVar("Result", Completion, Likelihood)
T = TypeVar("T")
Asked = tuple[list[GenerationRequest], list[ScoringRequest]]
"""What rank 0 asks of all ranks: one of the two; neither ends the session."""
NOTHING: Asked = ([], [])


class Session:
    """A model under the current layout, one chunk or those of virtual pipeline stages; `batch` requests go through it
    at a time.

    Rank 0 calls `generate` and `score`, every other rank `serve`, until rank 0 calls `close`.
    """

    def __init__(self, chunks: Sequence[TeleFLM], tokenizer: Tokenizer, batch: int = 1) -> None:
        self.tokenizer, self.batch = tokenizer, batch
        self._chunks = chunks

    def generate(self, requests: Sequence[GenerationRequest], on_text: OnText | None = None) -> list[Completion]:
        """Completions in the order of the requests. `on_text` gets the text of rank 0's own replica only.

        Raises RequestError for a model in several chunks, which have no cache.
        """
        if requests and len(self._chunks) > 1:
            raise RequestError(
                f"{len(self._chunks)} virtual pipeline stages: no text can be generated under them, as each forward "
                "pass is one of several micro-batches; evaluate a saved checkpoint instead"
            )
        return self._answer((list(requests), []), on_text)[0] if requests else []

    def score(self, requests: Sequence[ScoringRequest]) -> list[Likelihood]:
        """Likelihoods in the order of the requests."""
        return self._answer(([], list(requests)))[1] if requests else []

    def serve(self) -> None:
        """Answer rank 0 until it closes the session."""
        while any(self._answer(NOTHING)):
            pass

    def close(self) -> None:
        """Let the other ranks return from `serve`."""
        self._answer(NOTHING)

    def _answer(self, asked: Asked, on_text: OnText | None = None) -> tuple[list[Completion], list[Likelihood]]:
        """On every rank: answer what rank 0 asks, in the order of its requests."""
        to_complete, to_score = broadcast(asked)
        completions = self._shared(to_complete, lambda batch: generate(self._chunks[0], self.tokenizer, batch, on_text))
        return completions, self._shared(to_score, lambda batch: score(self._chunks, batch))

    def _shared(self, requests: list[Request], run: Callable[[list[Request]], list[Result]]) -> list[Result]:
        """The results of all requests, of which each replica does its shard of the batches."""
        if not requests:
            return []
        # Alike lengths go together, so that little is padded.
        ordered = sorted(requests, key=_length, reverse=True)
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = [result for batch in batches[rank::size] for result in run(batch)]
        shards = gathered(mine if is_output_rank() else [])
        by_index = {result.index: result for shard in shards for result in shard}
        return [by_index[request.index] for request in requests]


def _length(request: GenerationRequest | ScoringRequest) -> int:
    return len(request.prompt if isinstance(request, GenerationRequest) else request.ids)


def hold_session(
    evaluated: EvaluatedCheckpoint,
    parallel: ParallelConfig,
    precision: str | None,
    batch: int,
    lead: Callable[[Session], int],
) -> int:
    """On every rank: load the model; rank 0 runs `lead` with it, the others serve. Returns the exit status."""
    session = Session([load_model(evaluated, parallel, precision)], evaluated.tokenizer, batch)
    return lead_session(session, lead) or 0


def lead_session(session: Session, lead: Callable[[Session], T]) -> T | None:
    """On every rank: rank 0 runs `lead`, whose result it gets, the others serve it until then."""
    if dist.get_rank() != 0:
        session.serve()
        return None
    result = lead(session)
    session.close()
    return result
