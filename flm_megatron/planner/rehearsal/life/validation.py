"""A validation pass of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flm_megatron.config.schema import RunConfig
from flm_megatron.planner.rehearsal.ledger import Peak
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from flm_megatron.training.step import Batch, TrainState


@dataclass(frozen=True)
class ValidationPass:
    """What a rank holds, computes and sends in one pass over the first `samples` of a validation set.

    There are `sets` of them. The pass goes through `batches` global batches, each of `micro_batches` on this rank, of
    which `ran` of the first were run. `flops` are those of the whole pass; `transfers` are as they were run, the last
    one sums the losses of a global batch.
    """

    sets: int
    samples: int
    batches: int
    micro_batches: int
    ran: int
    peak: Peak
    flops: dict[str, int]
    transfers: tuple[Transfer, ...]

    def per_pass(self, transfer: Transfer) -> float:
        """How often one of `transfers` is done in a pass."""
        if transfer.repeats:
            return self.batches * self.micro_batches / self.ran
        return float(self.batches) if transfer is self.transfers[-1] else 1.0


def validate(
    recorder: Recorder, run: RunConfig, state: TrainState, batch: Batch, total: int, ran: int
) -> ValidationPass | None:
    """Run `ran` of the `total` micro-batches of a global batch of validation; none where the stage does not validate.

    What `recorder` noted before is left out.
    """
    stage = state.stage
    samples = stage.validation.samples
    if not samples or not run.data.validation:
        return None
    recorder.forget()
    recorder.ledger.moment = "start of validation"
    recorder.ledger.begin_peak()
    recorder.micro_batched = True
    state.validation_loss(iter([[batch] * ran]))
    recorder.micro_batched = False
    batches = -(-samples // stage.global_batch)
    flops = {name: count * batches * total // ran for name, count in recorder.flops.items()}
    transfers = recorder.forget()  # none where a rank is alone
    transfers = (*transfers[:-1], *(replace(losses, repeats=False) for losses in transfers[-1:]))
    peak = recorder.ledger.begin_peak()
    return ValidationPass(len(run.data.validation), samples, batches, total, ran, peak, flops, transfers)
