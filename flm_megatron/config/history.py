"""The history of a run: segments of steps with one batch, one sequence length and one mixture of sources.

A run file says what is wanted now; the history says what was done. It is kept in every checkpoint, and when a run
continues with another batch, sequence length or mixture, a segment is added. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flm_megatron.errors import DamagedError
from flm_megatron.json_text import Json

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class SegmentSource:
    """One source of a mixture, as the run file gave it, with the identity of its dataset."""

    name: str
    """Name in logs."""
    path: str
    """Where it was read from; a dataset may move."""
    weight: float | None = None
    """Share of the blend, as in the run file."""
    epochs: float | None = None
    """Passes over the source, as in the run file."""
    sha256: str | None = None
    """Hash of its ids (of its file, for conversations); none if it was saved before hashes were."""
    tokens: int | None = None
    """Ids in it; none for conversations, and if it was saved before they were counted here."""

    @property
    def amount(self) -> tuple[float | None, float | None]:
        """How much of it is taken: weight, epochs."""
        return self.weight, self.epochs


@dataclass(frozen=True, config=STRICT)
class Segment:
    """Steps of one stage with one batch, one sequence length and one mixture; it ends where the next one starts."""

    stage: str
    """Name of the stage."""
    first_step: int
    """Steps of the stage before it."""
    first_sample: int
    """Samples of the run before it, of whatever length."""
    first_token: int
    """Tokens of the run before it."""
    global_batch: int
    """Samples in a step."""
    sequence_length: int
    """Tokens in a sample."""
    sources: tuple[SegmentSource, ...] = ()
    """The mixture; empty where only budgets matter."""

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.sequence_length

    @property
    def mixture(self) -> tuple[int, dict[str, tuple[float | None, float | None]]]:
        """What the order of samples depends on, besides the seed and the start: length and shares."""
        return self.sequence_length, {source.name: source.amount for source in self.sources}

    def sample_at(self, step: int) -> int:
        """Samples of the run after `step` steps of the stage."""
        return self.first_sample + (step - self.first_step) * self.global_batch

    def tokens_at(self, step: int) -> int:
        """Tokens of the run after `step` steps of the stage."""
        return self.first_token + (step - self.first_step) * self.step_tokens


History = tuple[Segment, ...]
_HISTORY = TypeAdapter(History)


def history_to_json(history: Sequence[Segment]) -> list[dict[str, object]]:
    """The history as plain data, for a manifest."""
    return [asdict(segment) for segment in history]


def history_from_json(data: Json, where: str) -> History:
    """The history that `history_to_json` wrote; `where` names it in errors.

    Raises:
        DamagedError: it is none.
    """
    try:
        return _HISTORY.validate_python(data)
    except ValidationError as error:
        raise DamagedError(f"{where}: its history cannot be read: {error.errors()[0]['msg']}") from None
