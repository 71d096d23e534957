"""The masks of a growth on the modules of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flm_megatron.config.schema import ModelConfig
from flm_megatron.engine.transformer import TransformerLayer
from flm_megatron.model.mask_plan import MaskPlan
from flm_megatron.model.masks import earlier, sites
from flm_megatron.model.masks.mask import RankMasks
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.model.parameters.names import logical_name


class GrowthMasks:
    """The masks on the model chunks of this rank, closed (v = 0) until `set` opens them.

    `model` is the grown model, `chunks` the result of `build_model` (wrapped for data parallelism or not). Works under
    every layout: each rank masks its own shard of heads and feed-forward units.

    Raises:
        RequestError: the norms are fused into linear layers (Transformer Engine's), where masks cannot reach.
    """

    def __init__(self, chunks: Sequence[nn.Module], model: ModelConfig, plan: MaskPlan) -> None:
        self.v = 0.0
        self._masks = RankMasks(model, plan)
        self._undo: list[sites.Undo] = []
        mask_module = sites.mask_module if plan.paths == "once" else earlier.mask_module
        specs = parameter_specs(model)
        for chunk in chunks:
            for name, module in chunk.named_modules():
                own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
                rows = [row for o in own if (row := specs.get(logical_name(o, specs)))]
                self._undo += mask_module(module, rows, self._masks)
                if isinstance(module, TransformerLayer) and module.layer_number - 1 in plan.layers:
                    self._undo.append(module.register_forward_hook(self._blend, with_kwargs=True).remove)

    @property
    def installed(self) -> bool:
        """Whether any mask is still installed."""
        return bool(self._undo)

    def set(self, v: float) -> None:
        """Open the masks to v in [0, 1]; at 1 they are removed for good."""
        assert 0.0 <= v <= 1.0
        assert v == 1.0 or self.v < 1.0, "masks that were taken off do not come back"
        self.v = v
        self._masks.set(v)
        if v == 1.0:
            for undo in self._undo:
                undo()
            self._undo = []
            self._masks.forget()

    def _blend(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """v Layer(h) + (1 - v) h."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return torch.lerp(hidden, output[0], self.v), *output[1:]
