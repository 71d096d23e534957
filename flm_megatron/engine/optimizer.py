"""The optimizer of a rank's model chunks, and what it holds: megatron-core's, typed; imports the engine when called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from flm_megatron.device import current
from flm_megatron.engine.prepare import prepare
from flm_megatron.engine.replaced import replace

if TYPE_CHECKING:
    import torch

    from flm_megatron.config.schema import StageConfig
    from flm_megatron.engine.types import ChainedPart, Optimizer, ReplicatedChunk


@dataclass(frozen=True)
class GroupRule:
    """Parameters of one group, and the settings by which the engine tells the group from others when it loads."""

    name: str
    matches: Callable[[torch.nn.Parameter, str], bool]
    settings: Mapping[str, object]


def get_megatron_optimizer(
    stage: StageConfig, chunks: Sequence[ReplicatedChunk], rules: Iterable[GroupRule] = ()
) -> Optimizer:
    """The stage's optimizer over the chunks of this rank; each group carries `group`, the name of its rule."""
    prepare()
    from megatron.core import optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    overrides = {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=rule.name, fn=rule.matches)): {
            "group": rule.name,
            **rule.settings,
        }
        for rule in rules
    }
    return optimizer.get_megatron_optimizer(
        _settings(stage), list(chunks), config_overrides=overrides or None, use_gloo_process_groups=False
    )


def _settings(stage: StageConfig) -> object:
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


def install_fused_adam(adam: type[torch.optim.Optimizer], instead_of_a_library: bool) -> bool:
    """Put `adam` where megatron-core looks for FusedAdam, before any optimizer is built; returns whether it is there.

    Transformer Engine's or Apex's stays unless `instead_of_a_library`. Afterwards megatron-core takes the code path
    that it has for FusedAdam: steps in the groups, no step in the state of a parameter.
    """
    prepare()
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is adam:
        return True
    if not (instead_of_a_library or optimizer.USING_PYTORCH_OPTIMIZER):
        return False
    replace(optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=False)
    # It knows two owners of this convention; "Apex" is the one without Transformer Engine's extra state.
    replace(distrib_optimizer, Adam=adam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True, USING_TE_OPTIMIZER=False)
    return True


def install_clipping(applier: Callable[..., object], norm: Callable[..., object], scale: Callable[..., object]) -> None:
    """Put functions where megatron-core looks for the operations on lists of tensors of Transformer Engine or Apex.

    `applier(operation, overflow, lists, *arguments)` calls `norm(overflow, lists, per_tensor)` or
    `scale(overflow, lists, factor)`.
    """
    clip_grads = _clip_grads()
    replace(clip_grads, multi_tensor_applier=applier, l2_norm_impl=norm, multi_tensor_scale_impl=scale)
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):  # from 0.19 on; without it norms are numbers
        replace(clip_grads, multi_tensor_scale_tensor_impl=None)


def squares_of_gradients(optimizer: Optimizer) -> torch.Tensor:
    """Sum of the squares of the gradients that this rank counts, [1] fp32; of copies that ranks hold alike, one counts.

    What the engine's `get_grad_norm` sums over ranks, in an all-reduce of its own for which the host waits.
    """
    import torch

    gradients: list[torch.Tensor] = []
    for part in optimizer.chained_optimizers:  # from 0.19 on by another name
        given = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
        gradients += given()
    overflow = torch.zeros(1, dtype=torch.int, device=current().torch_device)
    if not gradients:
        return overflow.float()
    clip_grads = _clip_grads()
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
    return norm**2.0


def clip_grads_by_norm(part: ChainedPart, norm: float) -> None:
    """Scale the gradients of an optimizer so that their global norm, which is `norm`, is at most its `clip_grad`."""
    _clip_grads().clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)


def _clip_grads() -> ModuleType:
    prepare()
    from megatron.core.optimizer import clip_grads

    return clip_grads


def parts(optimizer: Optimizer) -> list[ChainedPart]:
    """The optimizers in it, without those that own no parameters."""
    return [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]


def initialise_state(optimizer: Optimizer) -> None:
    """Make the moments exist (zero) where no step has been taken yet."""
    for part in parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)


@dataclass(frozen=True)
class OwnedRange:
    """Values `start` to `end` of a local parameter, flat and row-major, which this rank updates; `state` holds their
    fp32 master (`param`) and the moments. Other data-parallel ranks own other ranges if `sharded`, else the same."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    sharded: bool
    state: Mapping[str, torch.Tensor]


def owned_ranges(part: ChainedPart) -> Iterator[OwnedRange]:
    """State of one optimizer that this process owns; its moments must exist."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return _distributed(part) if isinstance(part, DistributedOptimizer) else _replicated(part)


def _distributed(part: ChainedPart) -> Iterator[OwnedRange]:
    """Ranges of the data-parallel buffers, as megatron-core's DistributedOptimizer has divided them."""
    for buffer in part.gbuf_ranges:  # type: ignore[attr-defined]
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    owned = ranges["param"]
                    state = part._get_main_param_and_optimizer_states(parameter)  # type: ignore[attr-defined]
                    yield OwnedRange(parameter, owned.start, owned.end, True, state)


def _replicated(part: ChainedPart) -> Iterator[OwnedRange]:
    """Whole parameters: the fp32 optimizer's own, the mixed-precision optimizer's fp32 copies."""
    inner = part.optimizer
    pairs = [
        pair
        for copied, copies in zip(
            getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
        )
        for pair in zip(copied, copies, strict=True)
    ]
    copies = {id(copy) for _, copy in pairs}
    pairs += [(p, p) for group in inner.param_groups for p in group["params"] if id(p) not in copies]
    for parameter, master in pairs:
        yield OwnedRange(parameter, 0, parameter.numel(), False, {"param": master, **inner.state[master]})
