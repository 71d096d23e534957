"""What a rank does beside its steps."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.planner.rehearsal.ledger import Peak
from flm_megatron.planner.rehearsal.life.loading import Loading
from flm_megatron.planner.rehearsal.life.masks import MaskedStep
from flm_megatron.planner.rehearsal.life.saving import Saving
from flm_megatron.planner.rehearsal.life.validation import ValidationPass
from flm_megatron.planner.rehearsal.recorder import Transfer


@dataclass(frozen=True)
class Life:
    """How its stage starts and resumes, its first step where it grows behind masks, validation if it has one, and
    saving."""

    starting: Loading
    resuming: Loading
    masked: MaskedStep | None
    validation: ValidationPass | None
    saving: Saving

    @property
    def peaks(self) -> list[Peak]:
        """The most that the masked step and validation held."""
        return [part.peak for part in (self.masked, self.validation) if part is not None]

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All of them, in the order of the rank's life."""
        parts = (self.resuming, self.starting, self.masked, self.validation, self.saving)
        return sum((part.transfers for part in parts if part is not None), ())
