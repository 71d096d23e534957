"""Measures what a growth changed: logits and loss before and after, on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import GrowthConfig, ModelConfig, ShrinkConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.types import ModelChunk
from flm_megatron.errors import FlmError
from flm_megatron.growth.certificate.forward import Layout, forward_samples, on_one_replica, patient_processes
from flm_megatron.growth.change import ShapeChange
from flm_megatron.growth.record import Certificate, Comparison

POSITIONS = 256
"""Positions of each sample whose logits are compared, evenly spaced; the loss is over all positions."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
Evaluation = tuple[float, torch.Tensor]
"""Mean loss, and logits at POSITIONS of each sample."""


def certify(
    source: LogicalCheckpoint,
    grown: LogicalCheckpoint,
    plan: ShapeChange,
    stage: StageConfig,
    tokens: torch.Tensor,
    layout: Layout,
) -> Certificate:
    """Compare the old model with the grown one on `tokens` [samples, sequence + 1], in fp32 and in training precision.

    Runs on all processes of the world, outside any layout: both models are built on one replica, under the stage's
    layout (the old one under the nearest that fits it). The same certificate is returned on every rank.
    """
    comparisons = []
    for precision in dict.fromkeys(("fp32", stage.precision)):
        at = replace(stage, precision=precision)
        before = _evaluate(source, plan.old, at, tokens, layout)
        after = _evaluate(grown, plan.new, at, tokens, layout)
        comparisons.append(patient_processes().on_first(partial(_compare, before, after, precision)))
    return Certificate(stage.name, plan.preserving, len(tokens), tokens.shape[1] - 1, tuple(comparisons))


def check_certificate(certificate: Certificate, settings: GrowthConfig | ShrinkConfig, stage_index: int) -> None:
    """Refuse a growth or shrinking whose loss changed by more than its tolerance.

    A plain copy of layers does not preserve the function, nor does a smaller model: only a tolerance that the run file
    sets applies to these.

    Raises:
        FlmError: the change is too large; the message says how to go on all the same.
    """
    measured = certificate.comparisons[-1]
    limit = settings.loss_tolerance
    if limit is None:
        limit = TOLERANCE[measured.precision] if certificate.preserving else float("inf")
    if not measured.loss_change <= limit:
        change, section = ("growth", "growth") if isinstance(settings, GrowthConfig) else ("shrinking", "shrink")
        raise FlmError(
            f"{change} into stage {certificate.stage!r} changes the loss from {measured.loss_before:.6f} to "
            f"{measured.loss_after:.6f}, by {measured.loss_change:.1e} relative; the limit in {measured.precision} is "
            f"{limit:.1e}. To go on, raise it: "
            f"--stages.{stage_index}.{section}.loss_tolerance {measured.loss_change:.1e}"
        )


def _evaluate(
    checkpoint: LogicalCheckpoint,
    model: ModelConfig,
    stage: StageConfig,
    tokens: torch.Tensor,
    layout: Layout,
) -> Evaluation | None:
    """The evaluation, on rank 0; none elsewhere."""
    return on_one_replica(checkpoint, model, stage, layout, lambda chunks: _logits(chunks, tokens))


def _logits(chunks: Sequence[ModelChunk], tokens: torch.Tensor) -> Evaluation | None:
    """The evaluation, on rank 0."""
    losses: list[float] = []
    kept: list[torch.Tensor] = []
    spread = torch.linspace(0, tokens.shape[1] - 2, min(POSITIONS, tokens.shape[1] - 1)).long()

    def keep(sample: int, logits: torch.Tensor) -> None:
        """Keep the loss and the compared logits of a sample."""
        labels = tokens[sample, 1:].to(logits.device)
        losses.append(F.cross_entropy(logits.float().double(), labels).item())
        kept.append(logits[spread.to(logits.device)].float().cpu())

    forward_samples(chunks, tokens[:, :-1], keep)
    return _to_first(losses, kept)


def _to_first(losses: list[float], logits: list[torch.Tensor]) -> Evaluation | None:
    """Send the results to rank 0 from the first rank of its replica that has them."""
    group, device = parallel_state.get_model_parallel_group(), current().torch_device
    has, rank = bool(losses), dist.get_rank()
    holder = torch.tensor(rank if has else dist.get_world_size(), device=device)
    dist.all_reduce(holder, op=dist.ReduceOp.MIN, group=group)
    first = int(holder)
    if first != 0 and rank == first:
        dist.send_object_list([(sum(losses) / len(losses), torch.stack(logits))], dst=0, group=group, device=device)
    if rank != 0:
        return None
    if first == 0:
        return sum(losses) / len(losses), torch.stack(logits)
    received: list[Evaluation | None] = [None]
    dist.recv_object_list(received, src=first, group=group, device=device)
    return received[0]


def _compare(before: Evaluation | None, after: Evaluation | None, precision: str) -> Comparison:
    """Compare the results, on rank 0."""
    assert before is not None and after is not None, "rank 0 has the results"
    (loss_before, old), (loss_after, new) = before, after
    difference = (new - old).double()
    return Comparison(
        precision=precision,
        max_difference=difference.abs().max().item(),
        rms_difference=difference.square().mean().sqrt().item(),
        logit_std=old.double().std().item(),
        loss_before=loss_before,
        loss_after=loss_after,
    )
