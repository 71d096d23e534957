"""A loaded model that answers requests of rank 0 on all ranks: generation and scoring, over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.distributed.channels import broadcast, gathered
from flm_megatron.engine import parallel_state
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint
from flm_megatron.evaluation.generation.generate import Completion, GenerationRequest, OnText, generate
from flm_megatron.evaluation.model import load_model
from flm_megatron.evaluation.perplexity.scoring import Likelihood, ScoringRequest, score
from flm_megatron.model.forward import is_output_rank

Request = TypeVar("Request", GenerationRequest, ScoringRequest)


class Session:
    """The model of a checkpoint under the current layout; `batch` requests go through it at a time.

    Rank 0 calls `generate` and `score`, every other rank `serve`, until rank 0 calls `close`.
    """

    def __init__(
        self, evaluated: EvaluatedCheckpoint, parallel: ParallelConfig, precision: str | None = None, batch: int = 1
    ) -> None:
        self.tokenizer, self.batch = evaluated.tokenizer, batch
        self._chunk = load_model(evaluated, parallel, precision)

    def generate(self, requests: Sequence[GenerationRequest], on_text: OnText | None = None) -> list[Completion]:
        """Completions in the order of the requests. `on_text` gets the text of rank 0's own replica only."""
        return self._ask(list(requests), on_text)

    def score(self, requests: Sequence[ScoringRequest]) -> list[Likelihood]:
        """Likelihoods in the order of the requests."""
        return self._ask(list(requests), None)

    def serve(self) -> None:
        """Answer rank 0 until it closes the session."""
        while (requests := self._asked()) is not None:
            self._answer(requests, None)

    def close(self) -> None:
        """Let the other ranks return from `serve`."""
        broadcast(None)

    def _ask(self, requests: list[Any], on_text: OnText | None) -> list[Any]:
        assert dist.get_rank() == 0
        if not requests:
            return []
        results = self._answer(broadcast(requests), on_text)
        by_index = {result.index: result for result in results}
        return [by_index[request.index] for request in requests]

    def _asked(self) -> list[Any] | None:
        """What rank 0 asks for; none once it has closed the session."""
        return broadcast(None)

    def _answer(self, requests: Sequence[Any], on_text: OnText | None) -> list[Any]:
        """Do this replica's shard of the batches; returns the results of all."""
        # Alike lengths go together, so that little is padded.
        ordered = sorted(requests, key=_length, reverse=True)
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine: list[Any] = []
        for batch in batches[rank::size]:
            mine += self._run(batch, on_text)
        return [result for shard in gathered(mine if is_output_rank() else []) for result in shard]

    def _run(self, batch: Sequence[Any], on_text: OnText | None) -> list[Any]:
        if isinstance(batch[0], GenerationRequest):
            return generate(self._chunk, self.tokenizer, batch, on_text)
        return score(self._chunk, batch)


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
    session = Session(evaluated, parallel, precision, batch)
    if dist.get_rank() != 0:
        session.serve()
        return 0
    status = lead(session)
    session.close()
    return status
