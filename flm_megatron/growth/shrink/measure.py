"""Importance of units, from what a model does on given text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import ModelConfig, ShrinkConfig, StageConfig
from flm_megatron.engine import parallel_state
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.growth.certificate.forward import Layout, on_one_replica
from flm_megatron.growth.shrink.choice import wanted_criteria
from flm_megatron.growth.shrink.importance import Criterion, Dimension, Importance
from flm_megatron.growth.shrink.rules import CRITERIA
from flm_megatron.growth.shrink.watch import ImportanceSums, freeze_and_follow, watch_units
from flm_megatron.model.forward import Batch, forward, forward_and_backward

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM


def chosen_criteria(given: Mapping[Dimension, Criterion], shrink: ShrinkConfig | None) -> dict[Dimension, Criterion]:
    """`given`, and for every other dimension the criterion of the stage's section `shrink`, or the default.

    Raises:
        RequestError: there is no such dimension, or it has no such criterion.
    """
    if unknown := [name for name in given if name not in CRITERIA]:
        raise RequestError(f"criteria has no {unknown[0]!r}: give {', '.join(CRITERIA)}")
    for name, criterion in given.items():
        if criterion not in CRITERIA[name]:
            raise RequestError(f"the criterion of {name} is {criterion!r}: give {' or '.join(CRITERIA[name])}")
    return wanted_criteria(shrink or ShrinkConfig()) | dict(given)


def measure_importance(
    checkpoint: LogicalCheckpoint,
    model: ModelConfig,
    stage: StageConfig,
    tokens: torch.Tensor,
    layout: Layout,
    criteria: Mapping[Dimension, Criterion],
) -> Importance:
    """Importance of the units of `model` on `tokens` [samples, sequence + 1]; the same on every rank.

    Runs on all processes of the world, on one replica under the stage's layout and in its precision. `criteria` has a
    criterion for `hidden`, `ffn`, `heads` (activation, gradient) and `layers` (influence, gradient). All are means over
    tokens, summed in float64:

    - `activation`: |output| of a channel in each norm, over all norms; |input of linear_fc2| of a channel; the norm of
      a head's output.
    - `influence`: 1 - cos(input, output) of a layer (ShortGPT, arXiv 2403.03853).
    - `gradient`: |sum over channels of activation times dL/d activation|, with L the sum of the losses of a sample: by
      how much L would change, to first order, without the unit (Molchanov et al., arXiv 1906.10771). Of a layer the
      activation is what it adds, output - input. The backward pass keeps the activations of each sample in flight.

    Raises:
        DamagedError: (on every rank) the checkpoint cannot be read.
        FlmError: (on every rank) what was measured is not finite.
    """
    # Transformer Engine's fused modules hide what norms give out.
    stage = replace(stage, transformer_engine=False)
    sums = on_one_replica(checkpoint, model, stage, layout, partial(_summed, model, tokens, criteria))
    sums = sums or ImportanceSums(model)
    for summed in sums.all():
        dist.broadcast(summed, 0)
    found = _means(sums, model, tokens, criteria, checkpoint.manifest.logical_hash or None)
    if bad := [name for name, values in found.tensors.items() if not values.isfinite().all()]:
        raise FlmError(f"importance of {bad[0]} is not finite: the checkpoint's activations or gradients are not")
    return found


def _summed(
    model: ModelConfig, tokens: torch.Tensor, criteria: Mapping[Dimension, Criterion], chunks: Sequence[TeleFLM]
) -> ImportanceSums:
    """The sums over all tokens and ranks, on every rank of one replica."""
    sums = ImportanceSums(model)
    gradients = "gradient" in criteria.values()
    handles = freeze_and_follow(chunks) if gradients else []
    handles += watch_units(chunks, model, sums, criteria)
    run = forward_and_backward if gradients else forward
    batches = (Batch(sample[:, :-1], labels=sample[:, 1:]) for sample in tokens.split(1))
    run(chunks[0], batches, len(tokens), lambda _, losses: None)
    for handle in handles:
        handle.remove()
    for summed in sums.all():
        dist.all_reduce(summed, group=parallel_state.get_model_parallel_group())
    if not chunks[0].config.sequence_parallel:  # every tensor-parallel rank holds, and has added, all tokens
        for summed in (sums.hidden, sums.layers, sums.energy):
            summed /= parallel_state.get_tensor_model_parallel_world_size()
    return sums


def _means(
    sums: ImportanceSums,
    model: ModelConfig,
    tokens: torch.Tensor,
    criteria: Mapping[Dimension, Criterion],
    source_hash: str | None,
) -> Importance:
    samples, count = len(tokens), tokens[:, 1:].numel()
    influence = sums.influence[:, 0] / sums.influence[:, 2]
    return Importance(
        model,
        hidden=(sums.hidden / (count * len(sums.energy))).cpu(),
        ffn=(sums.ffn / count).cpu(),
        heads=(sums.heads / count).cpu(),
        layers=(influence if criteria["layers"] == "influence" else sums.layers / count).cpu(),
        energy=(sums.energy / count).cpu(),
        criteria=criteria,
        samples=samples,
        tokens=count,
        source_hash=source_hash,
    )
