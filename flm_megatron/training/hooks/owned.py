"""What each rank counts of the optimizer's state, so that sums over all ranks count every entry once."""

from __future__ import annotations

from collections.abc import Iterator

from flm_megatron.checkpoint.sharding.optimizer_state import (
    StateRegion,
    StateSlice,
    placements_by_parameter,
    state_regions,
    state_slices,
)
from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.engine import parallel_state
from flm_megatron.training.step import TrainState


def counted_regions(state: TrainState) -> Iterator[tuple[StateSlice, StateRegion]]:
    """Regions that this rank owns and has to count, with the slice of the optimizer's state that holds them; always in
    the same order."""
    first_replica = parallel_state.get_data_parallel_rank() == 0
    by_parameter = placements_by_parameter(placements(state.chunks))
    for owned in state_slices(state.optimizer):
        if owned.sharded or first_replica:
            for held in state_regions(owned, by_parameter):
                if held.placement.main:
                    yield owned, held


def layer_name(layer: int) -> str:
    """How metrics name a layer."""
    return f"layer_{layer:03d}"
