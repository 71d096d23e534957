"""Processes that work together and agree on whether the work succeeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from flm_megatron.distributed.channels import Channel, GroupChannel
from flm_megatron.errors import ERRORS, FlmError

T = TypeVar("T")


class Processes:
    """The processes of `channel` (of all, if torch.distributed runs; else this one alone)."""

    def __init__(self, channel: Channel | None = None) -> None:
        if channel is None and dist.is_available() and dist.is_initialized():
            channel = GroupChannel()
        self._channel = channel
        self.rank, self.size = (channel.rank, channel.size) if channel is not None else (0, 1)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank. Rank 0 gets the results of all ranks, the others their own one in every place.

        If it fails on any rank it fails on all: on the failing rank with its own error, elsewhere with the same kind of
        error and the rank's number.
        """
        results: list[T] = []
        error: Exception | None = None
        try:
            results = [work()]
        except Exception as caught:
            error = caught
        try:
            outcomes = self._gather((results, None if error is None else describe(error)))
        except FlmError as lost:  # only rank 0 finds out who did not answer
            self._broadcast([(0, describe(lost))])
            raise error or lost from None
        failures = [(rank, failure) for rank, (_, failure) in enumerate(outcomes) if failure] if outcomes else []
        failures = self._broadcast(failures)
        if error is not None:
            raise error
        if failures:
            rank, failure = failures[0]
            raise _error_of(rank, *failure)
        return [result for its, _ in outcomes for result in its] if outcomes else results * self.size

    def on_first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0; all ranks get its result or its error."""
        outcome: tuple[list[T], tuple[str, str] | None] = ([], None)
        if self.rank == 0:
            try:
                outcome = ([work()], None)
            except Exception as error:
                self._broadcast(([], describe(error)))
                raise
        results, failure = self._broadcast(outcome)
        if failure is not None:
            raise _error_of(0, *failure)
        return results[0]

    def _gather(self, value: T) -> list[T]:
        return [value] if self._channel is None or self.size == 1 else self._channel.gather(value)

    def _broadcast(self, value: T) -> T:
        return value if self._channel is None or self.size == 1 else self._channel.broadcast(value)


def describe(error: BaseException) -> tuple[str, str]:
    """Kind and message of an error, to be sent to other ranks: the most specific kind that they know, which has a
    status."""
    known = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS), None)
    if known is None:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    return known, "; ".join(line.strip() for line in str(error).split("\n"))  # of Mistakes each has a line


def _error_of(rank: int, kind: str, message: str) -> FlmError:
    """The error of another rank, from what `describe` made of it."""
    return ERRORS.get(kind, FlmError)(f"rank {rank}: {message}")
