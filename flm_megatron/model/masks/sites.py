"""Where masks lie, each path through a new unit being masked once.

Hidden channels are masked in the norms, through which all that they hold is read; the residual stream itself holds
them as they are. Feed-forward units and heads are masked where the next matrix reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flm_megatron.errors import RequestError
from flm_megatron.model.masks.mask import Mask, RankMasks
from flm_megatron.model.norms import LayerNorm, RMSNorm
from flm_megatron.model.parameters import ParameterSpec, Unit

Undo = Callable[[], None]
"""Takes a mask off again."""
NormForward = Callable[..., Tensor | tuple[Tensor, Tensor]]


def mask_module(module: nn.Module, rows: Sequence[ParameterSpec], masks: RankMasks) -> Iterator[Undo]:
    """Put masks on one module, `rows` being those of its own parameters in the table."""
    plan = masks.plan
    for spec in rows:
        if plan.hidden is not None and is_hidden_norm(spec):
            norm = reachable_norm(module)
            yield run_instead(norm, MaskedNorm(norm, masks.hidden()))
        if spec.kind == "matrix" and spec.value == "weight":
            if plan.ffn is not None and spec.find(Unit.FFN, "in") is not None:
                yield mask_input(module, masks.ffn())
            if plan.heads is not None and spec.find(Unit.HEAD, "in") is not None:
                yield mask_input(module, masks.heads())


def is_hidden_norm(spec: ParameterSpec) -> bool:
    """Whether it is a parameter of a norm over the hidden size."""
    return spec.kind == "norm" and spec.counts(Unit.HIDDEN)


def reachable_norm(module: nn.Module) -> RMSNorm | LayerNorm:
    """The norm that `module` is.

    Raises:
        RequestError: it is fused into a linear layer (Transformer Engine's), where masks cannot reach.
    """
    if not isinstance(module, (RMSNorm, LayerNorm)):
        raise RequestError(
            f"growth masks on the hidden size cannot reach the norm inside {type(module).__name__}: grow the "
            "hidden size with `zero`, or train this stage without Transformer Engine"
        )
    return module


def run_instead(norm: nn.Module, forward: NormForward) -> Undo:
    """Have a norm run `forward`."""
    norm.forward = forward

    def undo() -> None:
        """Bring the class's own back."""
        del norm.forward

    return undo


def mask_input(module: nn.Module, mask: Mask) -> Undo:
    """Mask what a linear layer reads."""
    module.reads_masked = True  # type: ignore[assignment]
    handle = module.register_forward_pre_hook(lambda _, args: (mask.hide(args[0]), *args[1:]))

    def undo() -> None:
        """Take the mask off."""
        handle.remove()
        del module.reads_masked

    return undo


class MaskedNorm:
    """The forward pass of a norm whose sums are over m x, with sum(m) channels, and whose output is masked."""

    def __init__(self, norm: RMSNorm | LayerNorm, mask: Mask) -> None:
        self.norm, self.mask = norm, mask

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [sequence, batch, hidden]: x rsqrt(sum(m x^2) / sum(m) + eps) w m, or by LayerNorm, with
        c = x - sum(m x) / sum(m): (c rsqrt(sum(m c^2) / sum(m) + eps) w + b) m.

        RMSNorm takes a residual too, and returns the sum of both beside its norm.
        """
        m, norm = self.mask.values, self.norm
        if isinstance(norm, RMSNorm):
            return norm.under_mask(x, residual, m)
        share = m.mean()  # sum(m) / d: turns a mean over all channels into one over masked ones
        wide = x.float()
        wide = wide - (wide * m).mean(-1, keepdim=True) / share
        variance = (wide.square() * m).mean(-1, keepdim=True) / share
        return ((wide * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias) * m).to(x.dtype)
