"""One rank of a stage through its life: built, loaded, a training step, validation, saved; without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron.config.rules.distillation import require_no_teacher
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.distributed.world import layout
from flm_megatron.engine import parallel_state
from flm_megatron.engine.optimizer import parts
from flm_megatron.engine.types import ReplicatedChunk
from flm_megatron.growth.schedule import all_masks
from flm_megatron.kernels.choice import choose, using
from flm_megatron.kernels.unlaunched import without_launches
from flm_megatron.optim.learning_rate import set_learning_rates
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.rehearsal.ledger import Ledger, Peak
from flm_megatron.planner.rehearsal.life.beginning import resumed, started
from flm_megatron.planner.rehearsal.life.life import Life
from flm_megatron.planner.rehearsal.life.loading import load
from flm_megatron.planner.rehearsal.life.masks import step_under_masks
from flm_megatron.planner.rehearsal.life.saving import saved
from flm_megatron.planner.rehearsal.life.validation import validate
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer, traffic
from flm_megatron.planner.rehearsal.timing.operation_times import OperationTimes
from flm_megatron.planner.rehearsal.timing.timeline import RankTimeline, Timeline
from flm_megatron.planner.rehearsal.world import rehearsed_world
from flm_megatron.planner.report.traffic import Traffic
from flm_megatron.planner.simulation.schedule import Schedule
from flm_megatron.training.step import Batch, TrainState


@dataclass(frozen=True)
class RankReport:
    """What one rank held, computed, sent, read and wrote; bytes and floating-point operations of one training step.

    `micro_batches` is how many the step has, `ran` how many of them were run: enough for the most memory that the
    schedule needs. FLOPs are those of all of them, and so are the counts that `per_step` gives.
    """

    rank: int
    world: int
    pipeline_rank: int
    layers: tuple[int, ...]
    parameters: int
    micro_batches: int
    ran: int
    steady: dict[str, int]
    """Bytes held between steps, by what they are for."""
    building: Peak
    """The most that building and loading held: for a moment weights lie there beside the buffers they go into."""
    peak: Peak
    """The most that the step held."""
    flops: dict[str, int]
    transfers: tuple[Transfer, ...]
    life: Life
    timeline: RankTimeline | None = None
    """What the step's passes do in seconds, where a machine was given."""

    @property
    def most_bytes(self) -> int:
        """The most that it held at any time."""
        return max(self.building.nbytes, self.peak.nbytes, *(peak.nbytes for peak in self.life.peaks))

    def per_step(self, transfer: Transfer) -> float:
        """How often one of `transfers` is done in a step: those of micro-batches that were not run are counted too."""
        return self.micro_batches / self.ran if transfer.repeats else 1.0

    def traffic(self) -> Traffic:
        """Those of a step."""
        return traffic(self.transfers, self.per_step)


def rehearse_rank(
    run: RunConfig,
    stage: StageConfig,
    rank: int,
    world: int,
    micro_batches: int | None = None,
    machine: Machine | None = None,
) -> RankReport:
    """Run one training step of `rank` of `world` processes; `stage` has its vocabulary.

    `micro_batches` is how many of the step's are run; without it as many as its memory grows over. With a `machine` the
    report has a timeline.

    Raises what the real rank would raise: RequestError for what the engine or a rule refuses, and errors of torch; and
    RequestError for a stage that distils, whose teacher is not rehearsed.
    """
    require_no_teacher(stage, "a rehearsal runs")
    with rehearsed_world(rank, world), layout(stage.parallel, run.distributed.timeout_s):
        return _Rehearsal(run, stage, rank, world, machine).report(micro_batches)


class _Rehearsal:
    def __init__(self, run: RunConfig, stage: StageConfig, rank: int, world: int, machine: Machine | None) -> None:
        self.run, self.stage, self.rank, self.world = run, stage, rank, world
        self.recorder = Recorder()
        self.recorder.replicas = tuple(dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))
        self.timeline = _timeline(stage, world, machine)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def report(self, micro_batches: int | None) -> RankReport:
        """The rank's life, and what it came to."""
        stage, ledger = self.stage, self.recorder.ledger
        total = stage.global_batch // stage.micro_batch // parallel_state.get_data_parallel_world_size()
        pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        ran = min(total, micro_batches or needed_micro_batches(stage, pipeline_rank))
        beginnings = resumed(self.run, stage), started(self.run, stage)
        plan = beginnings[1].plan
        with using(choose(self.run.kernels)), without_launches(self.recorder.launched), self.fake, self.recorder:
            ledger.moment = "building"
            state = TrainState(beginnings[1].stage, self.run.data.sequence_length)
            ledger.use, ledger.moment = "optimizer", "loading"
            resuming, starting = (load(self.recorder, state, beginning) for beginning in beginnings)
            _classify(ledger, state)
            ledger.use = "temporaries"
            steady, building = ledger.by_use(), ledger.begin_peak()
            masked = None
            if plan is not None and all_masks(plan):
                masked = step_under_masks(self.recorder, state, plan, lambda: self._step(state, ran))
            self._step(state, ran, self.timeline)
            flops, peak = dict(self.recorder.flops), ledger.begin_peak()
            transfers = self.recorder.forget()
            with _forward_passes(state.chunks, self.recorder):
                few = min(total, micro_batches or needed_micro_batches(stage, stage.parallel.pipeline - 1))
                validation = validate(self.recorder, self.run, state, _batch(self.run, stage), total, few)
            saving = saved(self.recorder, self.run, state, self.rank)
        return RankReport(
            rank=self.rank,
            world=self.world,
            pipeline_rank=pipeline_rank,
            layers=tuple(len(chunk.module.decoder.layers) for chunk in state.chunks),  # type: ignore[union-attr, arg-type]
            parameters=sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters()),
            micro_batches=total,
            ran=ran,
            steady=steady,
            building=building,
            peak=peak,
            flops={name: count * total // ran for name, count in flops.items()},
            transfers=transfers,
            life=Life(starting, resuming, masked, validation, saving),
            timeline=None if self.timeline is None else self.timeline.of_rank(schedule(stage, ran), pipeline_rank),
        )

    def _step(self, state: TrainState, micro_batches: int, timeline: Timeline | None = None) -> None:
        ledger, recorder = self.recorder.ledger, self.recorder
        set_learning_rates(state.optimizer, self.stage, self.stage.optimizer.lr)
        config = state.chunks[0].config
        finalize = config.finalize_model_grads_func

        def finish(*arguments: object, **named: object) -> None:
            """What comes after the last micro-batch is done once."""
            recorder.micro_batched, ledger.moment = False, "gradients"
            recorder.begin_pass(None)
            finalize(*arguments, **named)
            ledger.moment = "optimizer step"

        batch = _batch(self.run, self.stage)
        if timeline and self.stage.parallel.overlap_grad_reduce:
            self._settle(state, batch)
        config.finalize_model_grads_func = finish
        with _forward_passes(state.chunks, recorder), recorder.timing(timeline):
            ledger.moment, recorder.micro_batched = "start of the step", True
            state.train_step([batch] * micro_batches)
        config.finalize_model_grads_func = finalize
        ledger.moment = "end of the step"

    def _settle(self, state: TrainState, batch: Batch) -> None:
        """A step before the one that is noted: only from the second on does the engine reduce gradients beside the
        backward pass, for it learns from the first when they are ready."""
        parallel, recorder = self.stage.parallel, self.recorder
        state.train_step([batch] * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1))
        recorder.forget()
        recorder.ledger.begin_peak()


def needed_micro_batches(stage: StageConfig, pipeline_rank: int) -> int:
    """Micro-batches after which a step of a pipeline rank has held the most it will: those of the schedule's warm-up
    (1F1B, or interleaved with a virtual pipeline), and one more."""
    parallel = stage.parallel
    behind = parallel.pipeline - pipeline_rank - 1
    if parallel.virtual_pipeline == 1:
        return behind + 2
    chunks = 2 * behind + (parallel.virtual_pipeline - 1) * parallel.pipeline + 2
    each = -(-chunks // parallel.virtual_pipeline)
    return -(-each // parallel.pipeline) * parallel.pipeline


def schedule(stage: StageConfig, micro_batches: int) -> Schedule:
    """The engine's schedule of a stage's pipeline."""
    return Schedule(stage.parallel.pipeline, micro_batches, stage.parallel.virtual_pipeline)


def _timeline(stage: StageConfig, world: int, machine: Machine | None) -> Timeline | None:
    if machine is None:
        return None
    return Timeline(OperationTimes(machine), stage.parallel.tensor, world // stage.parallel.pipeline, world)


@contextmanager
def _forward_passes(chunks: Sequence[ReplicatedChunk], recorder: Recorder) -> Iterator[None]:
    """While the block runs, the recorder knows when passes of a micro-batch begin, and forward passes end."""
    ledger, begun = recorder.ledger, [0]

    def begin(chunk: int, *_: object) -> None:
        """Before a chunk's forward pass."""
        begun[0] += 1
        ledger.moment = f"forward pass {begun[0]}"
        ledger.begin_forward()
        recorder.begin_pass(False, chunk)

    def end(chunk: int, _: object, __: object, output: torch.Tensor) -> None:
        """After it: until the next one begins, what runs is a backward pass."""
        ledger.end_forward()
        ledger.moment = f"after forward pass {begun[0]}"
        if output.requires_grad:
            output.register_hook(lambda _: recorder.begin_pass(True, chunk))

    def logits(_: object, __: object, output: tuple[torch.Tensor, object]) -> None:
        """The head's product."""
        ledger.classify(output[0], "logits")

    handles = []
    for number, chunk in enumerate(chunks):
        handles += [
            chunk.register_forward_pre_hook(partial(begin, number)),
            chunk.register_forward_hook(partial(end, number)),
        ]
        head = getattr(chunk.module, "output_layer", None)
        if head is not None:
            handles.append(head.register_forward_hook(logits))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _classify(ledger: Ledger, state: TrainState) -> None:
    """Say what all that is held between steps is for."""
    for buffer in _gradient_buffers(state.chunks):
        ledger.classify(buffer, "gradients")
    for part in parts(state.optimizer):
        for values in part.optimizer.state.values():
            for tensor in values.values():
                if isinstance(tensor, torch.Tensor):
                    ledger.classify(tensor, "optimizer")
    for group in state.optimizer.param_groups:
        for master in group["params"]:
            ledger.classify(master, "optimizer")
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            ledger.classify(parameter, "weights")


def _gradient_buffers(chunks: Sequence[ReplicatedChunk]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        for buffer in chunk.buffers:  # type: ignore[attr-defined]
            yield buffer.grad_data
            if buffer.param_data is not None:
                yield buffer.param_data


def _batch(run: RunConfig, stage: StageConfig) -> Batch:
    """A micro-batch without values; of packed conversations it says which position belongs to which."""
    shape = (stage.micro_batch, run.data.sequence_length)
    packed = run.data.chat is not None and run.data.chat.packing
    names = ("tokens", "labels", "position_ids", *(("segments",) if packed else ()))
    return {**{name: torch.zeros(shape, dtype=torch.long) for name in names}, "loss_mask": torch.ones(shape)}
