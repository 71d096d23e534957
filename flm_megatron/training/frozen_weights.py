"""Half fine-tuning: half of the parameters are frozen, chosen by seed (arXiv 2404.18466)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.data.streams.permutation import Permutation
from flm_megatron.engine.types import ModelChunk
from flm_megatron.model.parameters import parameter_specs

Unit = tuple[str, int]
"""Logical name and layer (0 outside the layers)."""


def frozen_units(model: ModelConfig, seed: int) -> set[Unit]:
    """The units that half fine-tuning freezes: half of the layers of every tensor, and either embedding or head (where
    they are one, none or both).

    With an odd number of layers every second tensor has one more frozen layer than the others.
    """
    specs = parameter_specs(model).values()
    end = "embedding" if Permutation(2, f"{seed}/vocabulary")[0] else "head"
    units = {(spec.name, 0) for spec in specs if spec.kind == end}
    stacked = [spec.name for spec in specs if spec.stacked]
    for number, name in enumerate(stacked):
        order = Permutation(model.num_layers, f"{seed}/{name}")
        count = (model.num_layers + number % 2) // 2
        units |= {(name, order[place]) for place in range(count)}
    return units


def trained_count(stage: StageConfig) -> int:
    """Number of parameters of the whole model that a stage trains."""
    specs, layers = parameter_specs(stage.model), stage.model.num_layers
    units = frozen_units(stage.model, stage.trainable_seed) if stage.trainable == "half" else set()
    frozen = sum(specs[name].numel // (layers if specs[name].stacked else 1) for name, _ in units)
    return sum(spec.numel for spec in specs.values() if spec.trained) - frozen


def frozen_parameters(chunks: Sequence[ModelChunk], stage: StageConfig) -> list[torch.nn.Parameter]:
    """Parameters of this rank's chunks that a stage does not train."""
    if stage.trainable == "all":
        return []
    units = frozen_units(stage.model, stage.trainable_seed)
    found = {id(part.parameter): part.parameter for part in placements(chunks) if (part.name, part.layer or 0) in units}
    return list(found.values())


def freeze(chunks: Sequence[ModelChunk], frozen: list[torch.nn.Parameter]) -> None:
    """Zero the gradients of `frozen` once they are complete, so that they count in no norm and start no moment."""
    config = chunks[0].config
    finalize = config.finalize_model_grads_func

    def finalize_and_freeze(*args: object, **kwargs: object) -> None:
        """Finish the gradients, then clear those of frozen weights."""
        finalize(*args, **kwargs)
        for parameter in frozen:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]

    config.finalize_model_grads_func = finalize_and_freeze
