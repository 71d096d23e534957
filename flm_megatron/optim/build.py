"""The optimizer of a stage: megatron-core's, over the AdamW and the clipping that the kernels' choice names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from flm_megatron import kernels
from flm_megatron.config.schema import StageConfig
from flm_megatron.model.parameters import ParameterSpec, parameter_specs
from flm_megatron.optim.adamw import install_adamw
from flm_megatron.optim.clipping import install_clipping
from flm_megatron.optim.groups import DECAYED, GROUP_OF_KIND, Group, parameter_group

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer


def build_optimizer(stage: StageConfig, model_chunks: list[Any], frozen: Collection[int] = ()) -> MegatronOptimizer:
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
    from megatron.core.optimizer import get_megatron_optimizer

    specs = parameter_specs(stage.model)
    for chunk in model_chunks:
        for name, _ in chunk.named_parameters():
            parameter_group(name, specs)  # an unknown parameter is an error here, not one left out of every group
    # With gradients on, its views of fp32 parameters would hold these through autograd, and through the hooks there the
    # whole model: a ring that no garbage collector can see. Model and optimizer would outlive their stage.
    with torch.no_grad():
        return get_megatron_optimizer(
            engine_config(stage),
            model_chunks,
            config_overrides=_group_overrides(specs, frozen),
            use_gloo_process_groups=False,
        )


def engine_config(stage: StageConfig) -> Any:
    """megatron-core's optimizer configuration of a stage."""
    import torch
    from megatron.core.optimizer import OptimizerConfig

    options = stage.optimizer
    bf16 = stage.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        clip_grad=options.clip_grad,
        use_distributed_optimizer=stage.parallel.distributed_optimizer,
        overlap_param_gather=stage.parallel.overlap_param_gather,
    )


def _group_overrides(specs: Mapping[str, ParameterSpec], frozen: Collection[int]) -> dict[Any, Any]:
    """One tag per group, for megatron-core's rule of matching parameters by name.

    megatron-core tells groups apart on loading by `wd_mult`, `lr_mult`, `is_expert_parallel` and
    `is_decoupled_lr` alone, so these have to differ between the groups and stay the same when a model grows.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    def key(group: Group) -> Any:
        """The engine's key for one group."""

        def matches(param: torch.nn.Parameter, name: str) -> bool:
            """Whether the parameter is of the group."""
            return group == ("frozen" if id(param) in frozen else parameter_group(name, specs))

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=group, fn=matches))

    groups: set[Group] = set(GROUP_OF_KIND.values())
    if frozen:
        groups.add("frozen")
    return {
        key(group): {"group": group, "wd_mult": float(group in DECAYED), "is_decoupled_lr": group == "matrix"}
        for group in sorted(groups)
    }
