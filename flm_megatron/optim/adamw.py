"""AdamW over one fused kernel that counts its steps in the parameter groups.

Transformer Engine's and Apex's FusedAdam keep one integer `step` per parameter group, and megatron-core's
distributed optimizer saves and loads that. `torch.optim.AdamW`, its fallback where neither is installed, keeps a
step per parameter instead, which the distributed optimizer can neither save before the first step nor reshard.
With this class in the fallback's place there is one code path on every device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.optimizer import ParamsT

from flm_megatron import kernels
from flm_megatron.engine.optimizer import install_fused_adam
from flm_megatron.engine.types import ParameterGroup
from flm_megatron.optim.by_entry import BY_ENTRY, settling_steps, update_by_entry

FUSED_DEVICES = ("cpu", "cuda")
FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), bias-corrected.

    Takes the keywords megatron-core gives to FusedAdam. Each group has an int `step`, 0 before the first update
    and counted in every group whether or not this rank owns a part of it, so that all groups always agree. The
    state of a parameter is `exp_avg` and `exp_avg_sq`, of its shape and dtype, made on its first update. A state that
    also says something of each entry is updated by `optim.by_entry`: `step_offset` (int32 steps) until the offsets
    round away, `added` (bool) until `added_lr_mult`, the factor on the learning rate of such entries, is 1.

    `clip(factor)` before a step lets that step multiply gradients, in place, as it reads them.

    Raises:
        ValueError: a negative or non-finite learning rate, beta, epsilon or weight decay, `adam_w_mode=False` or
            `capturable=True`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True (steps inside CUDA graphs) is not offered: leave it false")
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False (weight decay inside the gradient) is not offered: use decoupled decay")
        if not (0.0 <= lr < float("inf") and 0.0 <= eps < float("inf") and 0.0 <= weight_decay < float("inf")):
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} have to be finite and not negative")
        if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
            raise ValueError(f"betas {betas} have to lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self._youngest: dict[torch.Tensor, int] = {}
        self._factor: float | None = None
        self.added_lr_mult = 1.0

    def clip(self, factor: float) -> None:
        """Multiply all gradients by `factor` at the next step."""
        self._factor = factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self._update_by_entry(group)
            for params in self._by_device_and_dtype(group):
                self._update(params, group)
        self._factor = None
        return loss

    def _by_device_and_dtype(self, group: ParameterGroup) -> list[list[torch.Tensor]]:
        """Parameters of `group` that have values and a gradient; one kernel call takes one device and dtype."""
        batches: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is not None and param.numel() and not self._differs_by_entry(param):
                batches[param.device, param.dtype].append(param)
        return list(batches.values())

    def _differs_by_entry(self, param: torch.Tensor) -> bool:
        """Whether the state of a parameter says something of each entry."""
        state = self.state.get(param, ())
        return any(name in state for name in BY_ENTRY)

    def _update_by_entry(self, group: ParameterGroup) -> None:
        """Update parameters whose entries differ; drop what no longer matters of each entry."""
        for param in group["params"]:
            if param.grad is None or not self._differs_by_entry(param):
                continue
            state = self.state[param]
            if "step_offset" in state:
                youngest = self._youngest.setdefault(param, int(state["step_offset"].max()) if param.numel() else 0)
                if group["step"] - youngest >= settling_steps(group["betas"]):
                    del state["step_offset"], self._youngest[param]
            if "added" in state and self.added_lr_mult == 1.0:
                del state["added"]
            if self._differs_by_entry(param):
                self._scale([param.grad])
                update_by_entry(param, self._state_of(param), group, self.added_lr_mult)

    def _update(self, params: list[torch.Tensor], group: ParameterGroup) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        states = [self._state_of(param) for param in params]
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        options = {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        device, dtype = params[0].device, params[0].dtype
        if device.type in FUSED_DEVICES and dtype in FUSED_DTYPES:
            factor = None if self._factor is None else torch.full((), self._factor, device=device)
            kernels.adamw_(params, grads, *moments, step=group["step"], grad_factor=factor, **options)
        else:
            self._scale(grads)
            # This form adds one to each step itself.
            steps = [torch.tensor(float(group["step"] - 1)) for _ in params]
            functional_adamw(params, grads, *moments, [], steps, foreach=True, amsgrad=False, maximize=False, **options)

    def _scale(self, grads: list[torch.Tensor]) -> None:
        """Clip gradients in a pass of their own, for updates that do not do it."""
        if self._factor is not None:
            torch._foreach_mul_(grads, self._factor)

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def install_adamw(replace: bool = False) -> bool:
    """Put `AdamW` where megatron-core looks for FusedAdam, before any optimizer is built.

    Transformer Engine's or Apex's FusedAdam stays unless `replace` is true. Afterwards megatron-core takes the
    code path it has for FusedAdam: steps in the groups, no step in the state of a parameter.

    Returns:
        Whether `AdamW` is what megatron-core will use.
    """
    return install_fused_adam(AdamW, instead_of_a_library=replace)
