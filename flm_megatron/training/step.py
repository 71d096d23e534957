"""One stage's model, wrapped for training, with its training step and its validation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.profiler import record_function

from flm_megatron.config.schema import DistillConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine.data_parallel import connect, replicate
from flm_megatron.engine.schedules import Report, forward_backward
from flm_megatron.engine.types import ModelChunk
from flm_megatron.model.attention.segments import segment_ends
from flm_megatron.model.fp8_linear import weights_cast_once
from flm_megatron.optim.epsilon import set_relative_epsilon
from flm_megatron.training.frozen_weights import freeze, frozen_parameters, trained_count
from flm_megatron.training.optimizer_step import clip_and_step, ready_squares
from flm_megatron.training.world_sums import NOTHING, Told, WorldSums, sum_over_world

Batch = dict[str, torch.Tensor]
TEACHER = "teacher"
"""Key of a batch under which the output ranks of a stage that distils have the teacher's logits."""
OPTIMIZER = "optimizer"
"""Profiler name of clearing gradients, computing their norm, clipping and updating."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, equal on every rank.

    `loss` is the cross entropy; `divergence` the mean KL from the teacher, none without one. `heard` are the flags that
    any rank passed, `refused` says why the weights were not changed.
    """

    loss: float
    tokens: int
    grad_norm: float
    heard: Told
    refused: str | None = None
    divergence: float | None = None


def accept_all(loss: float, grad_norm: float) -> str | None:
    """Refuse no step."""
    return None


class TrainState:
    """A stage's model chunks under megatron-core's data parallelism, with their optimizer.

    Built under initialised parallel groups. Weights are uninitialised until a checkpoint is loaded.
    """

    def __init__(self, stage: StageConfig, sequence_length: int) -> None:
        from flm_megatron.model.build import build_model
        from flm_megatron.model.gradient_accumulation import accumulate_in_buffers
        from flm_megatron.optim.build import build_optimizer

        self.stage = stage
        self.sequence_length = sequence_length
        place = current().place
        self.chunks = replicate([place(chunk) for chunk in build_model(stage.model, stage)], stage.parallel)
        accumulate_in_buffers(self.chunks)
        frozen = frozen_parameters(self.chunks, stage)
        self.optimizer = build_optimizer(stage, self.chunks, {id(parameter) for parameter in frozen})
        connect(self.chunks, self.optimizer, stage.parallel)
        if frozen:
            freeze(self.chunks, frozen)

    def train_step(
        self, batches: list[Batch], told: Told = NOTHING, judge: Callable[[float, float], str | None] = accept_all
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step.

        The weights stay as they are where `judge(loss, gradient norm)` gives a reason; it has to answer alike on all
        ranks. Ranks meet in one all-reduce, and the host waits once for the device, to read it.

        Takes tokens, labels, position_ids [micro_batch, sequence] int64 and loss_mask [micro_batch, sequence] fp32,
        and, where attention is to stay within segments, segments [micro_batch, sequence] int64. Of a stage that distils
        the last pipeline rank also needs the teacher's logits [micro_batch, sequence, ids] on the device, for the ids
        of its shard of the vocabulary that are no padding.
        Gradients and loss are means over all unmasked tokens of the global batch.
        """
        with record_function(OPTIMIZER):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        outputs, distill = self._run(batches, forward_only=False), self.stage.distill
        with record_function(OPTIMIZER):
            sums = sum_over_world(outputs, told, ready_squares(self.optimizer), taught=distill is not None)
            tokens = max(sums.tokens, 1)
            loss, divergence = sums.loss / tokens, sums.divergence / tokens if distill else None
            # Numbers, and what is remembered of earlier ones, are equal on all ranks, and so is the answer.
            refused = judge(loss, sums.grad_norm)
            if refused is None:
                set_relative_epsilon(self.optimizer, self.stage.optimizer, sums.grad_norm, self.trained)
                clip_and_step(self.optimizer, sums.grad_norm)
        return StepResult(loss, sums.tokens, sums.grad_norm, sums.heard, refused, divergence)

    @cached_property
    def trained(self) -> int:
        """Number of parameters of the whole model that learn."""
        return trained_count(self.stage)

    def validation_loss(self, batches: Iterator[list[Batch]]) -> float:
        """Mean loss over all unmasked tokens of the batches, in nats; the same on every rank."""
        total, count = 0.0, 0
        with self.evaluating():
            for group in batches:
                sums = self._losses(group, forward_only=True)
                total, count = total + sums.loss, count + sums.tokens
        return total / max(count, 1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """During the block the model is in evaluation mode, and nothing is kept for a backward pass."""
        for chunk in self.chunks:
            chunk.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in self.chunks:
                chunk.train(True)

    def _losses(self, batches: list[Batch], forward_only: bool) -> WorldSums:
        """Losses and tokens over all ranks."""
        return sum_over_world(self._run(batches, forward_only))

    def _run(self, batches: list[Batch], forward_only: bool) -> list[torch.Tensor]:
        """Losses and tokens of each micro-batch on the last pipeline rank, nothing elsewhere."""
        fp8 = self.stage.fp8 != "none"
        with weights_cast_once(self.chunks, len(batches)) if fp8 else nullcontext():
            return forward_backward(
                partial(forward_step, distill=self.stage.distill),
                [iter(batches) for _ in self.chunks],
                self.chunks,
                micro_batches=len(batches),
                micro_batch=self.stage.micro_batch,
                sequence_length=self.sequence_length,
                forward_only=forward_only,
            )


def forward_step(
    data_iterator: Iterator[Batch], model: ModelChunk, distill: DistillConfig | None = None
) -> tuple[torch.Tensor, Report[torch.Tensor]]:
    """megatron-core's forward step: the sum of the losses of unmasked tokens, where the batch has a teacher's logits
    with that of the divergences, and how to report them."""
    batch = on_device(next(data_iterator))
    mask, teacher = batch["loss_mask"], batch.get(TEACHER)
    wanted = {"labels": batch["labels"], "loss_mask": mask}
    if distill is None or teacher is None:
        total = model(batch["tokens"], batch["position_ids"], batch.get("segments"), **wanted)
        return total, partial(_with_tokens, mask)
    sums = model(batch["tokens"], batch["position_ids"], batch.get("segments"), **wanted, teacher=teacher)
    return sums, partial(_distilled, mask, distill)


def on_device(batch: Batch) -> Batch:
    """A micro-batch as the model takes it, on its device; segments become the ends of segments."""
    if "segments" in batch:  # numbers of the host, where they are read without waiting for the device
        batch = {**batch, "segments": segment_ends(batch["segments"])}
    return {name: tensor.to(current().torch_device, non_blocking=True) for name, tensor in batch.items()}


def _with_tokens(mask: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over unmasked tokens, their number, and both in float64 for the log (a copy: the engine scales in place)."""
    tokens = mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach().double(), tokens.double()])


def _distilled(
    mask: torch.Tensor, distill: DistillConfig, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_with_tokens`, for the sums of losses and divergences [2]: what is minimised mixes them, the log has both."""
    total, divergence = sums
    mixed = (1 - distill.weight) * total + distill.weight * distill.temperature**2 * divergence
    _, tokens, reported = _with_tokens(mask, total)
    return mixed, tokens, torch.cat([reported, divergence.detach().double().view(1)])
