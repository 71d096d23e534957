"""Hooks that sum the importance of units over tokens while a model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.growth.distance import TOKENS, watch_layers
from flm_megatron.growth.shrink.importance import Criterion, Dimension

if TYPE_CHECKING:
    from flm_megatron.engine.transformer import TransformerLayer
    from flm_megatron.model.teleflm import TeleFLM


class ImportanceSums:
    """Sums over tokens, in float64 on the device, over what this rank holds of a model; zero elsewhere."""

    def __init__(self, model: ModelConfig) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=current().torch_device)
        layers = model.num_layers
        self.hidden = zeros(model.hidden_size)
        self.ffn = zeros(layers, model.ffn_hidden_size)
        self.heads = zeros(layers, model.num_attention_heads)
        self.layers = zeros(layers)
        self.influence = zeros(layers, 3)
        """As `watch_layers` has it."""
        self.energy = zeros(2 * layers + 1, model.hidden_size)

    def all(self) -> list[Tensor]:
        """Every sum."""
        return [self.hidden, self.ffn, self.heads, self.layers, self.influence, self.energy]


def watch_units(
    chunks: Sequence[TeleFLM], model: ModelConfig, sums: ImportanceSums, criteria: Mapping[Dimension, Criterion]
) -> list[RemovableHandle]:
    """Hooks that add to `sums` the importance of all units by `criteria` (dimension to criterion).

    Of tensor-parallel ranks each adds its own feed-forward units and heads; the others are added by every rank that
    holds a token.
    """
    from flm_megatron.engine.transformer import TransformerLayer

    handles = []
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)):
        index = layer.layer_number - 1
        for offset, norm in enumerate((layer.input_layernorm, layer.pre_mlp_layernorm)):
            handles.append(_watch_norm(norm, sums, 2 * index + offset, criteria["hidden"]))
        handles.append(_watch_input(layer.mlp.linear_fc2, sums.ffn[index], 1, criteria["ffn"]))
        projection = layer.self_attention.linear_proj
        handles.append(_watch_input(projection, sums.heads[index], model.kv_channels, criteria["heads"]))
        if criteria["layers"] == "gradient":
            handles.append(_watch_contribution(layer, sums.layers[index]))
    if criteria["layers"] == "influence":
        handles += watch_layers(chunks, sums.influence)
    final = chunks[-1].decoder.final_layernorm
    if final is not None:  # the last pipeline rank's
        handles.append(_watch_norm(final, sums, 2 * model.num_layers, criteria["hidden"]))
    return handles


def _watch_norm(norm: nn.Module, sums: ImportanceSums, index: int, criterion: Criterion) -> RemovableHandle:
    """Add the importance of each channel in a norm's output, and each channel's square in what it scales."""
    from flm_megatron.model.norms import LayerNorm

    centred = isinstance(norm, LayerNorm)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        """Add those of one sample."""
        normed, stream = (output, args[0]) if isinstance(output, Tensor) else output
        for part in _rows(stream):
            wide = part.double()
            wide = wide - wide.mean(-1, keepdim=True) if centred else wide
            sums.energy[index] += wide.square().sum(0)
        _add_importance(sums.hidden, normed, 1, criterion)

    return norm.register_forward_hook(hook)


def _watch_input(linear: nn.Module, row: Tensor, channels: int, criterion: Criterion) -> RemovableHandle:
    """Add to `row` [units] the importance of each unit, of `channels` channels, in what a linear layer reads."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add those of one sample, of the units that this rank holds."""
        units = args[0].shape[-1] // channels
        start = parallel_state.get_tensor_model_parallel_rank() * units
        _add_importance(row[start : start + units], args[0], channels, criterion)

    return linear.register_forward_pre_hook(hook)


def _watch_contribution(layer: TransformerLayer, row: Tensor) -> RemovableHandle:
    """Add to `row` (0-dim) by how much the loss would change, to first order, without what the layer adds."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor, ...]) -> None:
        """Add those of one sample's tokens, once its gradient is known."""
        before, after = (args[0] if args else kwargs["hidden_states"]).detach(), output[0].detach()
        channels = after.shape[-1]

        def add(gradient: Tensor) -> None:
            """Add them."""
            for old, new, slope in zip(*(_rows(tensor) for tensor in (before, after, gradient)), strict=True):
                row.add_(_first_order(new.double() - old.double(), slope, channels).sum())

        output[0].register_hook(add)

    return layer.register_forward_hook(hook, with_kwargs=True)


def _add_importance(row: Tensor, values: Tensor, channels: int, criterion: Criterion) -> None:
    """Add to `row` [units] the importance of units, of `channels` channels each, over the tokens of `values`
    [sequence, batch, units x channels]: now, or with the gradient when it is known."""
    kept = values.detach()

    def add(gradient: Tensor) -> None:
        """Add the first-order importance."""
        for part, slope in zip(_rows(kept), _rows(gradient), strict=True):
            row.add_(_first_order(part.double(), slope, channels).sum(0))

    if criterion == "gradient":
        values.register_hook(add)
        return
    for part in _rows(kept):
        row.add_(part.double().unflatten(-1, (-1, channels)).norm(dim=-1).sum(0))


def _rows(values: Tensor) -> Sequence[Tensor]:
    """Tokens [some, channels] at a time."""
    return values.detach().flatten(0, -2).split(TOKENS)


def _first_order(values: Tensor, gradient: Tensor, channels: int) -> Tensor:
    """|sum over a unit's channels of value times gradient| [tokens, units]."""
    return (values * gradient.double()).unflatten(-1, (-1, channels)).sum(-1).abs()


def freeze_and_follow(chunks: Sequence[TeleFLM]) -> list[RemovableHandle]:
    """Have gradients go to activations alone: no parameter has one, and the embedding's output begins the graph."""
    handles = []
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.pre_process:
            handles.append(chunk.embedding.register_forward_hook(lambda _, args, output: output.requires_grad_()))
    return handles
