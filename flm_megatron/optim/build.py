"""The optimizer of a stage: megatron-core's, with the AdamW and the clipping that the run's kernels choose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from flm_megatron import kernels
from flm_megatron.config.schema import StageConfig
from flm_megatron.engine.optimizer import GroupRule, get_megatron_optimizer
from flm_megatron.model.parameters import ParameterSpec, parameter_specs
from flm_megatron.optim.adamw import install_adamw
from flm_megatron.optim.clipping import install_clipping
from flm_megatron.optim.groups import DECAYED, GROUP_OF_KIND, Group, parameter_group

if TYPE_CHECKING:
    import torch

    from flm_megatron.engine.types import Optimizer, ReplicatedChunk


def build_optimizer(stage: StageConfig, chunks: Sequence[ReplicatedChunk], frozen: Collection[int] = ()) -> Optimizer:
    """Optimizer over the chunks of this rank, each wrapped in megatron-core's DistributedDataParallel.

    Parameters whose `id` is in `frozen` are never changed; their gradients have to be zero.

    Every parameter group carries `group` (see `optim.groups`); learning rates and weight decays are written by
    `optim.learning_rate.set_learning_rates` before each step. The vocabulary of `stage.model` has to be known.

    Raises:
        KeyError: the model has a parameter that the table of logical parameters does not know.
    """
    install_adamw(replace=not kernels.current().engine_calls("adamw"))
    install_clipping()
    import torch

    specs = parameter_specs(stage.model)
    for chunk in chunks:
        for name, _ in chunk.named_parameters():
            parameter_group(name, specs)  # an unknown parameter is an error here, not one left out of every group
    # With gradients on, its views of fp32 parameters would hold these through autograd, and through the hooks there the
    # whole model: a ring that no garbage collector can see. Model and optimizer would outlive their stage.
    with torch.no_grad():
        return get_megatron_optimizer(stage, chunks, _group_rules(specs, frozen))


def _group_rules(specs: Mapping[str, ParameterSpec], frozen: Collection[int]) -> list[GroupRule]:
    """One rule per group, by which megatron-core matches parameters by name.

    megatron-core tells groups apart on loading by `wd_mult`, `lr_mult`, `is_expert_parallel` and
    `is_decoupled_lr` alone, so these have to differ between the groups and stay the same when a model grows.
    """

    def rule(group: Group) -> GroupRule:
        """The rule of one group."""

        def matches(param: torch.nn.Parameter, name: str) -> bool:
            """Whether the parameter belongs to the group."""
            return group == ("frozen" if id(param) in frozen else parameter_group(name, specs))

        return GroupRule(group, matches, {"wd_mult": float(group in DECAYED), "is_decoupled_lr": group == "matrix"})

    groups: set[Group] = set(GROUP_OF_KIND.values())
    if frozen:
        groups.add("frozen")
    return [rule(group) for group in sorted(groups)]
