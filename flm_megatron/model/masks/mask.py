"""Masks of this rank, as vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.model.mask_plan import MaskPlan


class Mask:
    """A vector that is 1 where `old` is true and v elsewhere, closed (v = 0) at first."""

    def __init__(self, old: Tensor) -> None:
        self.new = ~old.to(current().torch_device)
        self.values = torch.ones(old.shape, device=self.new.device)
        self.set(0.0)

    def set(self, v: float) -> None:
        """Open the mask to v."""
        self.values[self.new] = v

    def hide(self, x: Tensor) -> Tensor:
        """x times the mask along its last axis, in the dtype of x."""
        return x * self.values.to(x.dtype)


class RankMasks:
    """The masks of a plan on the grown `model`, each made when it is first asked for and shared by all modules."""

    def __init__(self, model: ModelConfig, plan: MaskPlan) -> None:
        self.model, self.plan = model, plan
        self._made: dict[object, Mask] = {}

    def set(self, v: float) -> None:
        """Open all of them to v."""
        for mask in self._made.values():
            mask.set(v)

    def forget(self) -> None:
        """Let go of them, once they are off the model."""
        self._made = {}

    def get(self, key: object, old: Callable[[], Tensor]) -> Mask:
        """The mask of one kind; `old` tells which entries of this rank are old, as booleans."""
        if key not in self._made:
            self._made[key] = Mask(old())
        return self._made[key]

    def hidden(self) -> Mask:
        """Of the hidden channels [hidden]."""
        return self.get("hidden", lambda: torch.arange(self.model.hidden_size) < (self.plan.hidden or 0))

    def ffn(self) -> Mask:
        """Of this rank's feed-forward units [units]."""
        return self.get("ffn", lambda: this_rank(self.old_units()))

    def heads(self) -> Mask:
        """Of the channels of this rank's query heads [channels]."""
        return self.get("heads", lambda: self.channels(self.old_heads()[0]))

    def old_units(self) -> Tensor:
        """Whether each feed-forward unit [units] is old."""
        return torch.arange(self.model.ffn_hidden_size) < (self.plan.ffn or 0)

    def old_heads(self) -> tuple[Tensor, Tensor]:
        """Whether each query head [groups, heads per group] and each group [groups, 1] is old."""
        assert self.plan.heads is not None
        old_groups, old_per_group = self.plan.heads
        groups = torch.arange(self.model.query_groups)[:, None] < old_groups
        per_group = self.model.num_attention_heads // self.model.query_groups
        return groups & (torch.arange(per_group) < old_per_group), groups

    def channels(self, heads: Tensor) -> Tensor:
        """A value for each channel of this rank's heads [channels], from one for each head [groups, heads]."""
        return this_rank(heads).flatten().repeat_interleave(self.model.kv_channels)


def this_rank(whole: Tensor) -> Tensor:
    """This tensor-parallel rank's shard along the first axis."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
