"""Groups and ranks of the current layout: megatron-core's `parallel_state`, typed; imports the engine when called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from flm_megatron.engine.prepare import prepare

if TYPE_CHECKING:
    import torch.distributed as dist

    from flm_megatron.config.schema import ParallelConfig

_VARIABLE = re.compile(r"_[A-Z0-9_]+|_global_process_group_list")
"""The module's variables, in which the engine keeps the layout."""


def initialize_model_parallel(parallel: ParallelConfig) -> None:
    """Make the groups of a layout over all processes of the world; every rank calls."""
    prepare()
    _state().initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )


def destroy_model_parallel() -> None:
    """Forget the layout; the groups themselves go with `distributed.layout_groups`."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    _state().destroy_model_parallel()
    # It keeps the angles of the last 32 calls, with the modules that made them and the groups of these.
    RotaryEmbedding.forward.cache_clear()


def known_layout() -> dict[str, object]:
    """All that the engine knows of the current layout: its groups, sizes and ranks by the names of its variables."""
    return {name: value for name, value in vars(_state()).items() if _VARIABLE.fullmatch(name)}


def set_layout(known: Mapping[str, object]) -> None:
    """Make the layout of `known_layout` the current one. Groups are neither made nor destroyed."""
    vars(_state()).update(known)


def get_tensor_model_parallel_rank() -> int:
    """This process's rank among those that share its layers' matrices."""
    return _state().get_tensor_model_parallel_rank()


def get_tensor_model_parallel_world_size() -> int:
    """How many ranks share a layer's matrices."""
    return _state().get_tensor_model_parallel_world_size()


def get_tensor_model_parallel_group() -> dist.ProcessGroup:
    """The ranks that share this one's layers' matrices."""
    return _state().get_tensor_model_parallel_group()


def get_pipeline_model_parallel_world_size() -> int:
    """Pipeline ranks."""
    return _state().get_pipeline_model_parallel_world_size()


def get_pipeline_model_parallel_rank() -> int:
    """This process's rank in its pipeline."""
    return _state().get_pipeline_model_parallel_rank()


def is_pipeline_first_stage(vp_stage: int | None = None) -> bool:
    """Whether model chunk `vp_stage` of this rank holds the embedding."""
    return _state().is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)


def is_pipeline_last_stage(vp_stage: int | None = None) -> bool:
    """Whether model chunk `vp_stage` of this rank (without one, its last) holds the head."""
    return _state().is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def get_data_parallel_rank() -> int:
    """This process's rank among the replicas of its shard."""
    return _state().get_data_parallel_rank(with_context_parallel=True)


def get_data_parallel_world_size() -> int:
    """How many replicas of a shard there are."""
    return _state().get_data_parallel_world_size(with_context_parallel=True)


def get_data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights as this one."""
    return _state().get_data_parallel_group(with_context_parallel=True)


def get_model_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold one replica of the model together with this one."""
    return _state().get_model_parallel_group()


def _state() -> ModuleType:
    from megatron.core import parallel_state

    return parallel_state
