"""A frozen model that runs before every step under a layout of its own, and whose logits go to the student's ranks."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.plan import Plan
from flm_megatron.checkpoint.exchange.transport import agreed_plan, exchange
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import RecordedTeacher
from flm_megatron.checkpoint.sharding.model_state import chunks_to_evaluate
from flm_megatron.checkpoint.tools.hashing import shared_hashes
from flm_megatron.checkpoint.torch_dist.logical_hash import combine_hashes
from flm_megatron.config.rules.pipeline import divisors
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.data.streams.loader import rank_samples, share_batches
from flm_megatron.data.streams.stage_streams import Stream
from flm_megatron.device import current
from flm_megatron.distributed.world import Layouts
from flm_megatron.engine import parallel_state
from flm_megatron.engine.schedules import Report, forward_backward
from flm_megatron.engine.types import ModelChunk
from flm_megatron.growth.boundary import masks_as_saved
from flm_megatron.growth.certificate.forward import fitting_layout, patient_processes
from flm_megatron.model.engine_config import DTYPES
from flm_megatron.model.parameters.axis import padded_vocab_size
from flm_megatron.training.distillation.source import TeacherSource
from flm_megatron.training.step import TEACHER, Batch, on_device

LOGITS = "teacher's logits"
"""Name of the tensor [sample of the step, position, id] that is exchanged."""


@dataclass(frozen=True)
class OutputShard:
    """What one rank has of the logits of a step: `samples` counted from its first, `ids` of the vocabulary without
    padding. Both are empty on a rank that has none, which is no rank of a last pipeline stage."""

    samples: range
    ids: range

    @classmethod
    def of_this_rank(cls, vocabulary: int, samples: range) -> OutputShard:
        """Under the current layout, where the rank's data-parallel share is `samples`."""
        if not parallel_state.is_pipeline_last_stage():
            return cls(range(0), range(0))
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        width = padded_vocab_size(vocabulary, tensor) // tensor
        first = width * parallel_state.get_tensor_model_parallel_rank()
        return cls(samples, range(min(first, vocabulary), min(first + width, vocabulary)))

    def empty(self, sequence_length: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for it [samples, sequence, ids] on the device."""
        return torch.empty(
            len(self.samples), sequence_length, len(self.ids), dtype=dtype, device=current().torch_device
        )

    def region(self, samples: range, sequence_length: int) -> Region:
        """The region of some of its samples."""
        return Region((samples.start, 0, self.ids.start), (len(samples), sequence_length, len(self.ids)))


class Teacher:
    """The teacher of a stage: its model chunk on this rank, and its way to the student's batches.

    Built on all ranks of the world inside the student's layout. Samples of a step are divided over its own
    data-parallel ranks; what it holds of them is sent, in the stage's precision, to where the student computes its
    loss, point to point and without a gather.
    """

    def __init__(self, source: TeacherSource, stage: StageConfig, sequence_length: int, under: Layouts) -> None:
        distill = stage.distill
        assert distill is not None
        parallel = teacher_layout(source.model, stage, dist.get_world_size())
        self.source, self.distill, self.stage, self.sequence_length = source, distill, stage, sequence_length
        self.parallel, self.dtype = parallel, DTYPES[stage.precision]
        vocabulary = int(source.model.vocab_size or 0)
        data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.wanted = OutputShard.of_this_rank(vocabulary, rank_samples(0, stage.global_batch, data_rank, data_size))
        self.second = under.beside(parallel)
        with self.second():
            share = even_share(
                stage.global_batch,
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
            )
            self.held = OutputShard.of_this_rank(vocabulary, share)
            self.share, self.micro_batch = share, largest_micro_batch(len(share), stage.micro_batch)
            self.chunks = chunks_to_evaluate(source.checkpoint, teacher_stage(source.model, stage, parallel))
            masks_as_saved(self.chunks, source.model, source.checkpoint.manifest)
        self.record = _record(source)
        self._plan: Plan | None = None
        self._feed: Generator[list[Batch], None, None] | None = None

    def begin(self, stream: Stream, first_sample: int) -> None:
        """Read the samples of its share from the step on that begins at `first_sample`."""
        self._feed = share_batches(stream, first_sample, self.stage.global_batch, self.micro_batch, self.share)

    def close(self) -> None:
        """End the reading."""
        if self._feed is not None:
            self._feed.close()

    @torch.no_grad()
    def teach(self, batches: list[Batch]) -> list[Batch]:
        """The student's micro-batches of the next step with the teacher's logits, on the ranks that need them; all
        ranks call."""
        assert self._feed is not None, "teaching begins with `begin`"
        held = self._forward(next(self._feed))
        taught = self.wanted.empty(self.sequence_length, self.dtype)
        sending = [(LOGITS, self.held.region(self.share, self.sequence_length), held)] if held.numel() else []
        receiving = [
            (LOGITS, self.wanted.region(range(sample, sample + 1), self.sequence_length), taught[place : place + 1])
            for place, sample in enumerate(self.wanted.samples)
            if self.wanted.ids
        ]
        if self._plan is None:
            self._plan = agreed_plan(sending, [[(name, region)] for name, region, _ in receiving])
        exchange(sending, receiving, self._plan)
        if not self.wanted.samples:
            return batches
        pieces = taught.split(self.stage.micro_batch)
        return [{**batch, TEACHER: piece} for batch, piece in zip(batches, pieces, strict=True)]

    def _forward(self, batches: list[Batch]) -> torch.Tensor:
        """Logits of this rank's share [samples, sequence, ids]; empty on a rank that has none."""
        held = self.held.empty(self.sequence_length, self.dtype)
        if batches:
            with self.second():
                forward_backward(
                    partial(_forward_step, iter(held.split(self.micro_batch)) if self.held.samples else iter(())),
                    [iter(batches)],
                    self.chunks,
                    micro_batches=len(batches),
                    micro_batch=self.micro_batch,
                    sequence_length=self.sequence_length,
                    forward_only=True,
                )
        return held

    def describe(self) -> str:
        """One line for the log."""
        at, parallel, distill = self.source.checkpoint.manifest.position, self.parallel, self.distill
        where = f" (stage {at.stage} step {at.step})" if at.stage is not None else ""
        data = dist.get_world_size() // parallel.model_size
        return (
            f"teacher: {self.source.path}{where}, tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
            f"{data} in {distill.precision or self.stage.precision}; temperature {distill.temperature:g}, weight "
            f"{distill.weight:g}"
        )


def teacher_layout(model: ModelConfig, stage: StageConfig, world: int) -> ParallelConfig:
    """The layout of a teacher of `model`: what the stage asks for, else its own or a smaller one that fits."""
    asked = stage.distill.parallel if stage.distill else None
    return replace(asked, data=None) if asked else fitting_layout(model, stage.parallel, world)


def teacher_stage(model: ModelConfig, stage: StageConfig, parallel: ParallelConfig) -> StageConfig:
    """The stage by which a teacher of `model` is built: FP8, recomputation and all that training needs is off."""
    precision = (stage.distill and stage.distill.precision) or stage.precision
    built = replace(stage, model=model, parallel=parallel, precision=precision, fp8="none", recompute="none")
    return replace(built, growth=None, shrink=None, distill=None)


def even_share(samples: int, rank: int, size: int) -> range:
    """Samples of one of `size` ranks, contiguous; shares differ by at most one."""
    return range(samples * rank // size, samples * (rank + 1) // size)


def largest_micro_batch(samples: int, most: int) -> int:
    """The largest micro-batch up to `most` that divides the samples of a rank."""
    return max(size for size in divisors(max(samples, 1)) if size <= most)


def _forward_step(
    places: Iterator[torch.Tensor], batches: Iterator[Batch], chunk: ModelChunk
) -> tuple[torch.Tensor, Report[None]]:
    """The engine's forward step over one micro-batch: its logits are written to the next of `places`."""
    batch = on_device(next(batches))
    output = chunk(batch["tokens"], batch["position_ids"], batch.get("segments"))

    def done(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Keep the logits of ids that are no padding; a loss of zero."""
        place = next(places)
        place.copy_(logits[..., : place.size(-1)])
        return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=logits.device), None

    return output, done


def _record(source: TeacherSource) -> RecordedTeacher:
    """What checkpoints of the stage say of it; a hash that its own manifest does not have is computed by all ranks."""
    at = source.checkpoint.manifest.position
    hashed = source.checkpoint.manifest.logical_hash
    if not hashed:
        hashed = combine_hashes(shared_hashes(source.checkpoint, patient_processes()))
    return RecordedTeacher(path=str(source.path), logical_hash=hashed, stage=at.stage, step=at.step)
