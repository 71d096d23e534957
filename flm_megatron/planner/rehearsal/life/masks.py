"""A step under the growth masks that a stage begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.schedule import all_masks
from flm_megatron.model.masks import GrowthMasks
from flm_megatron.planner.rehearsal.ledger import Peak
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from flm_megatron.training.step import TrainState


@dataclass(frozen=True)
class MaskedStep:
    """The first step of a stage that begins behind masks: dimensions that are masked, bytes of this rank's masks, and
    the peak and the transfers of the step."""

    dimensions: tuple[str, ...]
    nbytes: int
    peak: Peak
    transfers: tuple[Transfer, ...]


def step_under_masks(recorder: Recorder, state: TrainState, plan: GrowthPlan, step: Callable[[], None]) -> MaskedStep:
    """Run `step` with the masks of `plan` closed, those of earlier growths among them; they are gone afterwards, and so
    is what `recorder` noted."""
    ledger = recorder.ledger
    before = ledger.live
    opening = all_masks(plan)
    masks = [GrowthMasks(state.chunks, state.stage.model, each.masks) for each in opening]
    nbytes = ledger.live - before
    ledger.begin_peak()
    step()
    for each in masks:
        each.set(1.0)
    dimensions = tuple(name for each in opening for name in each.masks.dimensions)
    return MaskedStep(dimensions, nbytes, ledger.begin_peak(), recorder.forget())
