"""Growth masks, which hide new units of a grown model and fade them in.

The masks of MSG (Yao et al., arXiv 2305.02869) are 1 on old units and v on new ones. They are installed on a built
model as hooks and removed when v reaches 1: from then on the modules run exactly as without masks. Masked units are
hidden on both sides, so at v = 0 they get no gradient: the first step trains old units only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.transformer import TransformerLayer
from flm_megatron.errors import RequestError
from flm_megatron.model.mask_plan import MaskPlan
from flm_megatron.model.norms import LayerNorm, RMSNorm
from flm_megatron.model.parameters import Axis, ParameterSpec, Unit, parameter_specs
from flm_megatron.model.parameters.names import logical_name

Output = Tensor | tuple[Tensor | None, ...]


class Mask:
    """A vector that is 1 where `old` is true and v elsewhere."""

    def __init__(self, old: Tensor) -> None:
        self.new = ~old.to(current().torch_device)
        self.values = torch.ones(old.shape, device=self.new.device)

    def set(self, v: float) -> None:
        """Open the mask to v."""
        self.values[self.new] = v

    def hide(self, x: Tensor) -> Tensor:
        """x times the mask along its last axis, in the dtype of x."""
        return x * self.values.to(x.dtype)


class GrowthMasks:
    """The masks on the model chunks of this rank, closed (v = 0) until `set` opens them.

    `model` is the grown model, `chunks` the result of `build_model` (wrapped for data parallelism or not). Works under
    every layout: each rank masks its own shard of heads and feed-forward units.

    Raises:
        RequestError: the norms are fused into linear layers (Transformer Engine's), where masks cannot reach.
    """

    def __init__(self, chunks: Sequence[nn.Module], model: ModelConfig, plan: MaskPlan) -> None:
        self.model, self.plan, self.v = model, plan, 0.0
        self._handles: list[RemovableHandle] = []
        self._norms: list[nn.Module] = []
        self._masks: dict[Axis | str, Mask] = {}
        specs = parameter_specs(model)
        for chunk in chunks:
            for name, module in chunk.named_modules():
                own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
                self._install(module, [row for o in own if (row := specs.get(logical_name(o, specs)))])
        self.set(0.0)

    @property
    def installed(self) -> bool:
        """Whether any mask is still installed."""
        return bool(self._handles or self._norms)

    def set(self, v: float) -> None:
        """Open the masks to v in [0, 1]; at 1 they are removed for good."""
        assert 0.0 <= v <= 1.0
        assert v == 1.0 or self.v < 1.0, "masks that were taken off do not come back"
        self.v = v
        if v == 1.0:
            self._remove()
        for mask in self._masks.values():
            mask.set(v)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for norm in self._norms:
            del norm.forward  # the class's own comes back
        self._handles, self._norms, self._masks = [], [], {}

    def _install(self, module: nn.Module, rows: list[ParameterSpec]) -> None:
        """What is masked at one module, `rows` being those of its own parameters in the table."""
        for spec in rows:
            if self.plan.hidden is not None and spec.kind == "norm" and spec.counts(Unit.HIDDEN):
                self._install_norm(module)
            if spec.kind in ("matrix", "embedding") and spec.value == "weight":
                self._install_output(module, spec)
        if isinstance(module, TransformerLayer) and module.layer_number - 1 in self.plan.layers:
            self._handles.append(module.register_forward_hook(self._blend, with_kwargs=True))

    def _install_output(self, module: nn.Module, spec: ParameterSpec) -> None:
        """Hidden channels, feed-forward units and heads where they are given; new heads of old groups where they are
        taken."""
        plan = self.plan
        for axis in spec.axes:
            if plan.hidden is not None and (axis.unit, axis.side) == (Unit.HIDDEN, "out"):
                self._on_output(module, self._mask("hidden", self._old_hidden))
            if plan.ffn is not None and (axis.unit, axis.side) == (Unit.FFN, "out"):
                self._on_output(module, self._mask(axis, partial(self._old_ffn, axis)))
            if plan.heads is not None and (axis.unit, axis.side) == (Unit.HEAD, "out"):
                self._on_output(module, self._mask(axis, partial(self._old_head_rows, axis)))
        if plan.heads is not None and plan.heads[1] < self._per_group and spec.find(Unit.HEAD, "in") is not None:
            mixed = self._mask("mixed", self._old_mixed)
            hook = module.register_forward_pre_hook(lambda _, args: (mixed.hide(args[0]), *args[1:]))
            self._handles.append(hook)

    def _install_norm(self, module: nn.Module) -> None:
        if not isinstance(module, (RMSNorm, LayerNorm)):
            raise RequestError(
                f"growth masks on the hidden size cannot reach the norm inside {type(module).__name__}: grow the "
                "hidden size with `zero`, or train this stage without Transformer Engine"
            )
        module.forward = MaskedNorm(module, self._mask("hidden", self._old_hidden))  # type: ignore[method-assign]
        self._norms.append(module)

    def _on_output(self, module: nn.Module, mask: Mask) -> None:
        """Mask a module's output, and the bias it may return beside it."""

        def hook(_: nn.Module, args: object, output: Output) -> Output:
            """Mask what the module gave."""
            if isinstance(output, tuple):
                return tuple(None if part is None else mask.hide(part) for part in output)
            return mask.hide(output)

        self._handles.append(module.register_forward_hook(hook))

    def _blend(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """v Layer(h) + (1 - v) h."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return torch.lerp(hidden, output[0], self.v), *output[1:]

    def _mask(self, key: Axis | str, old: Callable[[], Tensor]) -> Mask:
        """This rank's mask of one kind, shared by all modules."""
        if key not in self._masks:
            self._masks[key] = Mask(old())
        return self._masks[key]

    def _old_hidden(self) -> Tensor:
        return torch.arange(self.model.hidden_size) < (self.plan.hidden or 0)

    def _old_ffn(self, axis: Axis) -> Tensor:
        return _this_rank(torch.arange(self.model.ffn_hidden_size) < (self.plan.ffn or 0)).repeat(len(axis.bands))

    @property
    def _per_group(self) -> int:
        return self.model.num_attention_heads // self.model.query_groups

    def _old_heads(self) -> tuple[Tensor, Tensor]:
        """Whether each query head [groups, heads per group] and each group [groups, 1] is old."""
        assert self.plan.heads is not None
        old_groups, old_per_group = self.plan.heads
        groups = torch.arange(self.model.query_groups)[:, None] < old_groups
        return groups & (torch.arange(self._per_group) < old_per_group), groups

    def _old_head_rows(self, axis: Axis) -> Tensor:
        """Rows of the query-key-value matrix: per group its queries, key and value."""
        queries, groups = self._old_heads()
        bands = [groups if band.name in ("key", "value") else queries for band in axis.bands]
        return _this_rank(torch.cat(bands, 1)).flatten().repeat_interleave(self.model.kv_channels)

    def _old_mixed(self) -> Tensor:
        """Channels that the projection reads, but for new groups, whose values are masked already.

        A new query head of an old group reads values that are not masked, so its output has to be.
        """
        queries, groups = self._old_heads()
        return _this_rank(queries | ~groups).flatten().repeat_interleave(self.model.kv_channels)


class MaskedNorm:
    """The forward pass of a norm over masked channels: sums run over x m, and sum(m) is the number of channels."""

    def __init__(self, norm: RMSNorm | LayerNorm, mask: Mask) -> None:
        self.norm, self.mask = norm, mask

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [sequence, batch, hidden]: x m rsqrt(sum((x m)^2) / sum(m) + eps) w m (LayerNorm: x - mean).

        RMSNorm takes a residual too, and returns the sum of both beside its norm.
        """
        m, norm = self.mask.values, self.norm
        if isinstance(norm, RMSNorm):
            return norm.under_mask(x, residual, m)
        share = m.mean()  # sum(m) / d: turns a mean over all channels into one over masked ones
        wide = x.float()
        wide = (wide - (wide * m).mean(-1, keepdim=True) / share) * m
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) / share + norm.eps) * norm.weight
        return ((out + norm.bias) * m).to(x.dtype)


def _this_rank(whole: Tensor) -> Tensor:
    """This tensor-parallel rank's shard along the first axis."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
