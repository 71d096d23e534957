"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers whose frozen weight W learns as W + alpha / rank x B A.

Under tensor parallelism the factor on the side on which W is split is split with it; the other is on every rank.
Communication is of the width of the rank of B A, not of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flm_megatron.config.schema import LoraConfig
from flm_megatron.engine.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    apply_swiglu_sharded_factory,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    make_sharded_tensors_for_checkpoint,
    mark_split,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from flm_megatron.model.engine_config import EngineConfig
from flm_megatron.model.parameters import ParameterSpec
from flm_megatron.model.parameters.names import logical_name

ParallelLinear: TypeAlias = ColumnParallelLinear | RowParallelLinear
Offsets = Iterable[tuple[int, int, int]]
"""Of axes that are put before a parameter's own: the axis, which of its fragments, of how many."""


def linear(base: type, target: str, lora: LoraConfig | None) -> type:
    """The class of the linear layer `target`: `base`, with adapters if `lora` names it."""
    if lora is None or target not in lora.targets:
        return base
    adapted = {ColumnParallelLinear: AdaptedColumnParallelLinear, RowParallelLinear: AdaptedRowParallelLinear}[base]
    return type(f"{adapted.__name__}_{target}", (adapted,), {"gated": target == "fc1"})


class AdaptedColumnParallelLinear(ColumnParallelLinear):
    """A linear layer whose output is split: `lora_a` [rank, input] on every rank, `lora_b` [output, rank] split."""

    gated = False

    def __init__(self, *args: object, config: EngineConfig, **kwargs: object) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.scale = _add_factors(self, config, split_a=False)

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, output shard], and the bias if it is not added."""
        output, bias = super().forward(input_, *args, **kwargs)
        inner = F.linear(input_, self.lora_a)
        inner = (
            gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True)
            if self.sequence_parallel
            else copy_to_tensor_model_parallel_region(inner)
        )
        return output + self.scale * F.linear(inner, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Offsets, metadata: Mapping[str, object]
    ) -> dict[str, object]:
        """Where the parameters lie in the logical tensors."""
        sharded = _sharded(self, prefix, {"weight": 0, "bias": 0, "lora_b": 0}, sharded_offsets, metadata)
        if self.gated and self.config.gated_linear_unit:
            sharded[f"{prefix}lora_b"] = apply_swiglu_sharded_factory(sharded[f"{prefix}lora_b"], sharded_offsets)
        return sharded


class AdaptedRowParallelLinear(RowParallelLinear):
    """A linear layer whose input is split: `lora_a` [rank, input] split, `lora_b` [output, rank] on every rank."""

    gated = False

    def __init__(self, *args: object, config: EngineConfig, **kwargs: object) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.scale = _add_factors(self, config, split_a=True)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output [sequence shard, batch, output], and the bias if it is not added."""
        output, bias = super().forward(input_)
        inner = F.linear(input_, self.lora_a)
        inner = (
            reduce_scatter_to_sequence_parallel_region(inner)
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region(inner)
        )
        return output + self.scale * F.linear(inner, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Offsets, metadata: Mapping[str, object]
    ) -> dict[str, object]:
        """Where the parameters lie in the logical tensors."""
        return _sharded(self, prefix, {"weight": 1, "lora_a": 1}, sharded_offsets, metadata)


def _add_factors(layer: ParallelLinear, config: EngineConfig, split_a: bool) -> float:
    """Give a layer its two factors; returns alpha / rank."""
    lora = config.lora
    assert lora is not None, "adapters are built where they are configured"
    rows, columns = layer.weight.shape
    for name, shape, axis in (("lora_a", (lora.rank, columns), 1), ("lora_b", (rows, lora.rank), 0)):
        factor = nn.Parameter(torch.zeros(shape, dtype=layer.weight.dtype, device=layer.weight.device))
        split = split_a == (name == "lora_a")
        mark_split(factor, axis, split)
        # A factor that is not split sees only this rank's shard of the sequence.
        factor.sequence_parallel = config.sequence_parallel and not split  # type: ignore[attr-defined]
        setattr(layer, name, factor)
    return lora.alpha / lora.rank


def _sharded(
    layer: ParallelLinear, prefix: str, axes: dict[str, int], offsets: Offsets, metadata: Mapping[str, object]
) -> dict[str, object]:
    state = layer.state_dict(prefix="", keep_vars=True)
    groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)


def train_adapters_only(chunk: nn.Module, specs: Mapping[str, ParameterSpec]) -> None:
    """Freeze every parameter but the adapters' factors: they get no gradient and no optimizer state."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(specs[logical_name(name, specs)].trained)
