"""Trains one stage from where it stands to its end, or until a signal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch.distributed as dist

from flm_megatron import kernels
from flm_megatron.checkpoint.exchange.live import Crossing
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, RecordedLayout, RecordedTeacher, SpikeState, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_live_state, load_state
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import history_to_json
from flm_megatron.config.schema import GrowthConfig, RunConfig, StageConfig
from flm_megatron.data.streams.loader import batches
from flm_megatron.data.streams.stage_streams import training_stream
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware
from flm_megatron.distributed.signals import StopRequest, stop_on_signal
from flm_megatron.distributed.world import Layouts, is_main_rank
from flm_megatron.engine import parallel_state
from flm_megatron.errors import DamagedError
from flm_megatron.growth.grown.entries import load_entries, set_added_lr_mult
from flm_megatron.growth.grown.step_offsets import earlier_growth
from flm_megatron.growth.record import ChangeRecord, change_of
from flm_megatron.growth.schedule import lr_multipliers
from flm_megatron.kernels import fp8
from flm_megatron.model.attention.segments import packing_notice
from flm_megatron.model.engine_config import DTYPES
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.distillation.source import open_teacher
from flm_megatron.training.distillation.teacher import Teacher
from flm_megatron.training.hooks import Hook, stage_hooks
from flm_megatron.training.hooks.saving import Saving
from flm_megatron.training.metrics.events import GrowthEvent, NewLevelEvent, RefusedEvent, RestartEvent, StepEvent
from flm_megatron.training.metrics.flops import training_flops_per_token
from flm_megatron.training.metrics.goodput import Meter, read_goodput
from flm_megatron.training.metrics.log import DIVERGENCE, MetricsLog
from flm_megatron.training.resume.changes import (
    announce,
    find_changes,
    segment_begins,
    teacher_changes,
    validation_hashes,
)
from flm_megatron.training.resume.live import LiveBoundary
from flm_megatron.training.resume.memory_copies import MemoryCopies
from flm_megatron.training.resume.start import Beginning, Start, begin, checkpoint_store
from flm_megatron.training.resume.unfinished_save import bring_to_end
from flm_megatron.training.spikes import SpikeWatch, joined
from flm_megatron.training.step import Batch, StepResult, TrainState
from flm_megatron.training.telemetry.observers import Observers
from flm_megatron.training.world_sums import Told

RECENT_STEPS = 20


def train_stage(
    run: RunConfig,
    start: Start,
    copies: MemoryCopies | None = None,
    live: LiveBoundary | None = None,
    more_hooks: Callable[[RunConfig], Sequence[Hook]] = lambda run: (),
    observers: Observers | None = None,
) -> bool:
    """Train the stage of `start`, on every rank of the world; returns whether the run may go on.

    False means that a signal asked for a stop, perhaps in the stage's last step, and a checkpoint was saved. With
    `copies` the state is also kept in memory, and the stage continues from copies that were found there. With `live`
    it begins from the memory of the stage before, and leaves its own state there for the next. `more_hooks` makes
    those that a room above brings, `observers` are told what this rank does.

    Raises:
        RequestError: a kernel that the run file asks for by name, or FP8 in any of its stages, is not there.
        DamagedError: stored data is damaged. Of a checkpoint of the run it is noted: `find_start` passes it over then.
    """
    seen = observers or Observers()
    kernels.use(kernels.choose(run.kernels))
    for stage in run.stages:
        fp8.require(stage)
    try:
        with Layouts(run.distributed.timeout_s) as under:
            grows = not start.resumes and run.stages[start.stage].growth is not None
            with seen.spanning("growth" if grows else "open", run.stages[start.stage].name):
                beginning = begin(run, start, under, copies.checkpoint if copies else None, live)
            with under(beginning.stage.parallel), stop_on_signal() as stop:
                with seen.spanning("load", beginning.stage.name):
                    trainer = StageTrainer(run, start, beginning, copies, more_hooks(run), seen)
                if live:
                    live.release()
                try:
                    trainer.teacher = _teacher(run, start.stage, trainer.stage, under)
                    goes_on = trainer.train(stop)
                    if live and goes_on and start.stage + 1 < len(run.stages):
                        live.keep(trainer.state.chunks, trainer.state.optimizer, trainer.manifest().position)
                    return goes_on
                except BaseException as error:
                    bring_to_end(trainer.saving.pending, error, run.distributed.timeout_s)
                    raise
                finally:
                    trainer.close()
    except DamagedError as error:
        checkpoint_store(run).note_damage(error)
        raise


class StageTrainer:
    """A stage in training: its model with its optimizer, its position in the stream, its log and its checkpoints."""

    def __init__(
        self,
        run: RunConfig,
        start: Start,
        beginning: Beginning,
        copies: MemoryCopies | None = None,
        more_hooks: Sequence[Hook] = (),
        observers: Observers | None = None,
    ) -> None:
        self.index, self.step, self.start = start.stage, start.step, start
        self.budgets = stage_budgets(run, start.history)
        self.budget = self.budgets[start.stage]
        self.stage, self.plan = beginning.stage, beginning.plan
        self.run = replace(run, stages=[*run.stages[: self.index], self.stage, *run.stages[self.index + 1 :]])
        self.state = TrainState(self.stage, run.data.sequence_length)
        self.checkpoint = beginning.checkpoint
        self.crossing = self._begin(beginning)
        self.watch = SpikeWatch(self.stage.stability, _watched(start, self.checkpoint.manifest))
        self.change, self.distances = _change_record(beginning), beginning.distances
        self.earlier = earlier_growth(self.checkpoint, changes=self.change is not None)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.log = _open_log(self.run, self.index, self.step, observers)
        self.meter = Meter(Path(run.output) if is_main_rank() else None, observers)
        self.meter.begin(self.index, self.stage.name, self.step)
        self.times: deque[float] = deque(maxlen=RECENT_STEPS)
        self.copies = copies
        self.teacher: Teacher | None = None
        self.saving = Saving(self)
        self.hooks = stage_hooks(self, copies, more_hooks)
        self.stream = training_stream(run, self.index, start.history)
        self.validation_sha256 = validation_hashes(run)

    def train(self, stop: StopRequest) -> bool:
        """Train to the end of the budget or to a stop request and save; returns whether no stop was requested."""
        first = self.budget.sample_at(self.step)
        feed = batches(
            self.stream, first, self.stage.global_batch, self.stage.micro_batch, self.data_rank, self.data_size
        )
        if self.teacher:
            self.teacher.begin(self.stream, first)
        stopped = False
        for hook in self.hooks:
            hook.on_start(self)
        if self.log:
            self._announce(self.log)
        try:
            while self.step < self.budget.steps and not stopped:
                asked = time.perf_counter()
                group = next(feed)
                stopped = self._train_step(group, stop, time.perf_counter() - asked)
                self._at_intervals()
        finally:
            feed.close()
            if self.teacher:
                self.teacher.close()
        for hook in self.hooks:
            hook.on_end(self, self.step >= self.budget.steps)
        if self.log and (goodput := read_goodput(Path(self.run.output))):
            self.log.say(goodput.text())
        return not stopped

    def position(self) -> tuple[str, int, int]:
        """Where the stage stands, as every metrics event records it: stage name, steps done, tokens of the run."""
        return self.stage.name, self.step, self.budget.tokens_at(self.step)

    def _announce(self, log: MetricsLog) -> None:
        """Log how the stage begins."""
        if self.change and self.step == 0:
            certificate, change = self.change.certificate, self.change.plan.CHANGE
            log.write(GrowthEvent(*self.position(), certificate, self.distances, change))
            if certificate:
                log.say(certificate.table(change))
            if self.change.notice:
                log.say(f"WARNING: {self.change.notice}")
        if self.step:
            log.write(RestartEvent(*self.position()))
        if self.start.history[1:] or self.start.resumes:
            changes = find_changes(self.run, self.start, self.checkpoint.manifest, self.data_size)
            changes += teacher_changes(self.start, self.checkpoint.manifest, self._taught_by())
            announce(log, changes, *self.position())
        if self.copies and self.copies.line:
            log.say(self.copies.line)
        if self.crossing:
            log.say(f"{self.stage.name} {self.crossing.text()}")
        for reason in self.start.passed_over:
            log.say(f"WARNING: going on from {self.start.source}, for a newer checkpoint is damaged: {reason}")
        if self.teacher:
            log.say(self.teacher.describe())
        log.say(kernels.current().describe())
        if self.stage.precision == "bf16" and (notice := kernels.weight_gradient_notice()):
            log.say(notice)
        if (self.run.data.chat and self.run.data.chat.packing) or self.stage.model.sliding_window:
            notice = packing_notice(self.stage.model, DTYPES[self.stage.precision])
            if notice:
                log.say(notice)
        if self.stage.fp8 != "none":
            log.say(fp8.describe(self.stage.fp8, current().name))
        log.begin(self.stage.name, self.step, self.budget.steps)

    def close(self) -> None:
        """Close the logs."""
        self.meter.close()
        if self.log:
            self.log.close()

    def _train_step(self, group: list[Batch], stop: StopRequest, waited_s: float) -> bool:
        """One step with its learning rate, its check and its report; returns whether a stop was requested."""
        began = time.perf_counter()
        lr = self._learning_rate()
        set_learning_rates(self.state.optimizer, self.stage, lr)
        for hook in self.hooks:
            hook.before_step(self)
        if self.teacher:
            group = self.teacher.teach(group)
        result = self.state.train_step(group, Told(stop.asked, self.saving.failed), self.watch.reason)
        self.step += 1
        self.times.append(time.perf_counter() - began)
        self.meter.step(self.step, self.times[-1], waited_s, result.refused is None)
        if result.heard.save_failed:
            self.saving.finish(self)  # raises why, on every rank
        if result.refused:
            self._refuse(result, result.refused)
        else:
            self._report(result, lr)
        return result.heard.stop

    def _learning_rate(self) -> float:
        """The learning rate of the next step: the schedule's, times what a stage that has just grown is given."""
        rate = learning_rate(self.budget.tokens_at(self.step + 1), self.run, self.index, self.budgets)
        if self.plan is None:
            return rate
        factor, of_added = lr_multipliers(self.stage.growth or GrowthConfig(), self.plan, self.step)
        set_added_lr_mult(self.state.optimizer, of_added)
        return rate * factor

    def _report(self, result: StepResult, lr: float) -> None:
        """Log the metrics of a step that was applied, with those of hooks."""
        level = self.watch.applied(result.loss, result.grad_norm)
        measured = {name: value for hook in self.hooks for name, value in hook.after_step(self, result).items()}
        if result.divergence is not None:
            measured[DIVERGENCE] = result.divergence
        if self.log:
            interval = self.run.logging.interval_steps
            speak = self.step % interval == 0 or self.step == self.budget.steps
            self.log.step(self._step_event(result, lr, measured), self.budget.steps, speak)
            if level:
                self.log.write(NewLevelEvent(*self.position(), level))
                self.log.say(f"{self.stage.name} step {self.step} | {level}")

    def _refuse(self, result: StepResult, reason: str) -> None:
        """Report the samples of a step that was not applied, and act as the policy says."""
        samples = range(self.budget.sample_at(self.step - 1), self.budget.sample_at(self.step))
        policy = self.stage.stability.policy
        if self.log:
            names = [name for index in samples for name in self.stream.names(index)]
            self.log.refused(
                RefusedEvent(*self.position(), reason, policy, tuple(names)),
                f"{self.stage.name} step {self.step} refused ({policy}): {reason}; samples {joined(names)}",
            )
        named = f"samples {samples.start} to {samples.stop - 1}"
        self.watch.refused(self.step, reason, named, result.loss, result.grad_norm)
        if policy == "rollback":
            self.saving.finish(self)
            path = self.saving.saved_path
            with self.meter.stall("rollback", step=self.saving.saved_step if path else self.start.step):
                self._load(open_checkpoint(path) if path else self.checkpoint)

    def _begin(self, beginning: Beginning) -> Crossing | None:
        """Load the stage's beginning, out of the memory of the ranks (returns what that took) or its checkpoint."""
        if beginning.live is None:
            self._load(beginning.checkpoint)
            return None
        crossing = load_live_state(beginning.live, self.state.chunks, self.state.optimizer)
        load_entries(beginning.checkpoint, self.stage, self.state.chunks, self.state.optimizer)
        return crossing

    def _load(self, checkpoint: LogicalCheckpoint) -> None:
        """Load weights and optimizer from a checkpoint."""
        load_state(checkpoint, self.state.chunks, self.state.optimizer)
        load_entries(checkpoint, self.stage, self.state.chunks, self.state.optimizer)

    def _step_event(self, result: StepResult, lr: float, measured: dict[str, float]) -> StepEvent:
        """The metrics of the step that was just applied, with those of hooks."""
        device = current()
        per_device = self.budget.segments[-1].step_tokens / self.times[-1] / dist.get_world_size()
        tflops = per_device * training_flops_per_token(self.stage.model, self.run.data.sequence_length) / 1e12
        peak = _peak_tflops(self.stage.precision)
        return StepEvent(
            *self.position(),
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            step_time_s=self.times[-1],
            tokens_per_s_per_device=per_device,
            tflops_per_device=tflops,
            mfu=tflops / peak if peak else None,
            peak_memory_gib=device.peak_memory_gib(),
            eta_s=(self.budget.steps - self.step) * median(self.times),
            skipped_steps=self.watch.skipped,
            extra=measured,
        )

    def _at_intervals(self) -> None:
        for hook in self.hooks:
            if hook.interval_steps > 0 and self.step % hook.interval_steps == 0:
                hook.at_interval(self)

    def _taught_by(self) -> RecordedTeacher | None:
        return self.teacher.record if self.teacher else None

    def manifest(self) -> Manifest:
        """The manifest of a checkpoint of this step."""
        change = self.change.in_manifest() if self.change else Manifest()
        samples = self.budget.sample_at(self.step)
        adam_step = max((group.get("step", 0) for group in self.state.optimizer.param_groups), default=0)
        position = StagePosition(self.step, samples, self.budget.tokens_at(self.step), adam_step)
        return (
            stage_manifest(self.run, self.index, self.stage.model, position)
            | change
            | Manifest(
                history=history_to_json(self.start.history),
                validation_sha256=self.validation_sha256,
                earlier_growth=self.earlier,
                stability=self.watch.state(),
                teacher=self._taught_by(),
                layout=RecordedLayout.model_validate(asdict(self.stage.parallel) | {"world": dist.get_world_size()}),
            )
        )


def _watched(start: Start, manifest: Manifest) -> SpikeState | None:
    """The state of the spike guard for a stage that resumes.

    Where batch, length or mixture change, losses and norms may change too: then only the count of refused steps is
    kept.
    """
    saved = manifest.stability if start.resumes else None
    return SpikeState(skipped=saved.skipped) if saved and segment_begins(start) else saved


def _teacher(run: RunConfig, index: int, stage: StageConfig, under: Layouts) -> Teacher | None:
    """The teacher of the stage, built inside its layout; none if it does not distil."""
    if stage.distill is None:
        return None
    return Teacher(open_teacher(run, index), stage, run.data.sequence_length, under)


def _change_record(beginning: Beginning) -> ChangeRecord | None:
    """The growth or shrinking that the stage began with, for its checkpoints."""
    if beginning.plan is None and beginning.shrinking is None:
        return None
    change = change_of(beginning.checkpoint.manifest)
    return change.certified(beginning.certificate) if change else None


def _open_log(run: RunConfig, index: int, step: int, observers: Observers | None) -> MetricsLog | None:
    """The main rank's log."""
    if not is_main_rank():
        return None
    names = [stage.name for stage in run.stages]
    return MetricsLog(Path(run.output), run.logging.tensorboard, names, names[index], step, observers)


def _peak_tflops(precision: Literal["fp32", "bf16"]) -> float | None:
    hardware = find_hardware(current().hardware_name())
    return hardware.peak_tflops(precision) if hardware else None
