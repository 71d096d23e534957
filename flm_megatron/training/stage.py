"""Training one stage from where it stands to its end, or until a signal."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch.distributed as dist

from flm_megatron import kernels
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import SaveHandle, load_state, prepare_asynchronous_save, save_state
from flm_megatron.checkpoint.stage_manifest import StagePosition, stage_manifest
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import history_to_json
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.streams import Stream, training_stream, validation_streams_of
from flm_megatron.data.streams.loader import batches, validation_batches
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware
from flm_megatron.distributed.signals import StopRequest, stop_on_signal
from flm_megatron.distributed.world import Layouts, is_main_rank
from flm_megatron.errors import DamagedError
from flm_megatron.growth.certificate.certificate import Certificate, certified
from flm_megatron.growth.grown.births import earlier_growth, load_births
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.schedule import mask_plan, mask_value
from flm_megatron.kernels import fp8
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.checks.layer_norms import layer_norms
from flm_megatron.training.checks.replicas import check_replicas
from flm_megatron.training.checks.spikes import SpikeWatch, joined
from flm_megatron.training.metrics.flops import training_flops_per_token
from flm_megatron.training.metrics.goodput import Meter, read_goodput
from flm_megatron.training.metrics.log import MetricsLog, StepMetrics
from flm_megatron.training.resume.changes import announce, find_changes, segment_begins, validation_hashes
from flm_megatron.training.resume.memory_copies import MemoryCopies, forgotten_on_error
from flm_megatron.training.resume.start import Beginning, Start, begin, checkpoint_store
from flm_megatron.training.resume.unfinished_save import bring_to_end
from flm_megatron.training.step import Batch, Engine, StepResult, Told

RECENT_STEPS = 20


def train_stage(run: RunConfig, start: Start, copies: MemoryCopies | None = None) -> bool:
    """Train the stage that `start` names, on every rank of the world; returns whether it came to its end.

    False means that a signal stopped it, after a checkpoint was saved. With `copies` the state is also kept in memory,
    and what was found there is where it goes on.

    Raises:
        RequestError: a kernel that the run file asks for by name, or FP8 in any of its stages, is not there.
        DamagedError: stored data is damaged. Of a checkpoint of the run it is noted: `find_start` passes it over then.
    """
    kernels.use(kernels.choose(run.kernels))
    for stage in run.stages:
        fp8.require(stage)
    try:
        with Layouts(run.distributed.timeout_s) as under:
            beginning = begin(run, start, under, copies.view if copies else None)
            with under(beginning.stage.parallel), stop_on_signal() as stop:
                trainer = StageTrainer(run, start, beginning, copies)
                try:
                    return trainer.train(stop)
                except BaseException as error:
                    bring_to_end(trainer.pending, error, run.distributed.timeout_s)
                    raise
                finally:
                    trainer.close()
    except DamagedError as error:
        checkpoint_store(run).note_damage(error)
        raise


class StageTrainer:
    """One stage under way: its engine, its place in the stream, its log and its checkpoints."""

    def __init__(self, run: RunConfig, start: Start, beginning: Beginning, copies: MemoryCopies | None = None) -> None:
        from megatron.core import parallel_state

        self.index, self.step, self.start = start.stage, start.step, start
        self.budgets = stage_budgets(run, start.history)
        self.budget = self.budgets[start.stage]
        self.stage, self.plan = beginning.stage, beginning.plan
        self.run = replace(run, stages=[*run.stages[: self.index], self.stage, *run.stages[self.index + 1 :]])
        self.engine = Engine(self.stage, run.data.sequence_length)
        self.view = beginning.view
        self._load(self.view)
        self.watch = SpikeWatch(self.stage.stability, _watched(start, self.view.manifest))
        self.growth = _growth_record(beginning)
        self.earlier = earlier_growth(self.view, grows=self.growth is not None)
        self.masks = _masks(self.engine, self.plan, self.step)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.log = _open_log(self.run, self.index, self.step)
        self.meter = Meter(Path(run.output) if is_main_rank() else None)
        self.meter.begin(self.index, self.stage.name, self.step)
        self.store = checkpoint_store(run)
        if is_main_rank():
            self.store.clean([stage.name for stage in run.stages])
        self.pending: SaveHandle | None = None
        self.times: deque[float] = deque(maxlen=RECENT_STEPS)
        self.saved_step = start.step if start.step and start.source else -1
        self.saved_path = start.source if start.resumes else None
        self.compared_step = -1
        self.copies = copies
        if run.checkpoint.asynchronous:
            prepare_asynchronous_save(self.engine.chunks, self.engine.optimizer)
        if copies:
            copies.reserve(self.engine.chunks, self.engine.optimizer)
        self.stream = training_stream(run, self.index, start.history)
        self.validation = validation_streams_of(run) if self.stage.validation.samples else {}
        self.validation_sha256 = validation_hashes(run)

    def train(self, stop: StopRequest) -> bool:
        """Train to the end of the budget, or to a stop request; saves before it returns."""
        first = self.budget.sample_at(self.step)
        feed = batches(
            self.stream, first, self.stage.global_batch, self.stage.micro_batch, self.data_rank, self.data_size
        )
        stopped = False
        if self.log:
            self._announce(self.log)
        try:
            if self.step and self.saved_step < 0 and self.stage.stability.policy == "rollback":
                self._save()  # copies in memory are not kept for ever
            while self.step < self.budget.steps and not stopped:
                asked = time.perf_counter()
                group = next(feed)
                stopped = self._train_step(group, stop, time.perf_counter() - asked)
                self._at_intervals()
        finally:
            feed.close()
        finished = self.step >= self.budget.steps
        if finished and self.stage.validation.samples and not self._due(self.stage.validation.interval_steps):
            self._validate()
        self._save()
        self._finish_save()
        if self.log and (goodput := read_goodput(Path(self.run.output))):
            self.log.say(goodput.text())
        return finished

    def _announce(self, log: MetricsLog) -> None:
        """Say how the stage begins."""
        if self.growth and self.step == 0:
            certificate = self.growth.get("certificate")
            tokens = self.budget.first_token
            log.record({"stage": self.stage.name, "step": 0, "tokens": tokens, "certificate": certificate})
            if certificate:
                log.say(Certificate.from_json(certificate).table())
        if self.step:
            tokens = self.budget.tokens_at(self.step)
            log.record({"stage": self.stage.name, "step": self.step, "tokens": tokens, "restart": True})
        if self.start.history[1:] or self.start.resumes:
            changes = find_changes(self.run, self.start, self.view.manifest, self.data_size)
            announce(log, changes, self.stage.name, self.step, self.budget.tokens_at(self.step))
        if self.copies and self.copies.line:
            log.say(self.copies.line)
        for reason in self.start.passed_over:
            log.say(f"WARNING: going on from {self.start.source}, for a newer checkpoint is damaged: {reason}")
        log.say(kernels.current().describe())
        if self.stage.fp8 != "none":
            log.say(fp8.describe(self.stage.fp8, current().name))
        log.begin(self.stage.name, self.step, self.budget.steps)

    def close(self) -> None:
        """End the logs."""
        self.meter.close()
        if self.log:
            self.log.close()

    def _train_step(self, group: list[Batch], stop: StopRequest, waited_s: float) -> bool:
        """One step with its learning rate, its check and its report; returns whether a stop was asked for."""
        began = time.perf_counter()
        lr = learning_rate(self.budget.tokens_at(self.step + 1), self.run, self.index, self.budgets)
        set_learning_rates(self.engine.optimizer, self.stage, lr)
        self._open_masks()
        save_failed = self.pending is not None and self.pending.failed
        result = self.engine.train_step(group, Told(stop.asked, save_failed), self.watch.reason)
        self.step += 1
        self.times.append(time.perf_counter() - began)
        self.meter.step(self.step, self.times[-1], waited_s, result.refused is None)
        if result.heard.save_failed:
            self._finish_save()  # raises why, on every rank
        if result.refused:
            self._refuse(result, result.refused)
            return result.heard.stop
        level = self.watch.applied(result.loss, result.grad_norm)
        norms = layer_norms(self.engine) if self.run.logging.layer_norms else {}
        if self.log:
            interval = self.run.logging.interval_steps
            speak = self.step % interval == 0 or self.step == self.budget.steps
            self.log.step(self._metrics(result, lr), self.budget.steps, speak, norms)
            if level:
                values = {"stage": self.stage.name, "step": self.step, "tokens": self.budget.tokens_at(self.step)}
                self.log.record({**values, "new_level": level})
                self.log.say(f"{self.stage.name} step {self.step} | {level}")
        return result.heard.stop

    def _refuse(self, result: StepResult, reason: str) -> None:
        """Say which samples a step that was not applied had, and do what the policy asks for."""
        samples = range(self.budget.sample_at(self.step - 1), self.budget.sample_at(self.step))
        policy = self.stage.stability.policy
        if self.log:
            names = [name for index in samples for name in self.stream.names(index)]
            values = {"stage": self.stage.name, "step": self.step, "tokens": self.budget.tokens_at(self.step)}
            self.log.refused(
                {**values, "refused": reason, "policy": policy, "samples": names},
                f"{self.stage.name} step {self.step} refused ({policy}): {reason}; samples {joined(names)}",
            )
        named = f"samples {samples.start} to {samples.stop - 1}"
        self.watch.refused(self.step, reason, named, result.loss, result.grad_norm)
        if policy == "rollback":
            self._finish_save()
            with self.meter.stall("rollback", step=self.saved_step if self.saved_path else self.start.step):
                self._load(open_checkpoint(self.saved_path) if self.saved_path else self.view)

    def _load(self, view: LogicalCheckpoint) -> None:
        """Weights and optimizer of a checkpoint."""
        load_state(view, self.engine.chunks, self.engine.optimizer)
        load_births(view, self.engine.chunks, self.engine.optimizer)

    def _open_masks(self) -> None:
        """Set the growth masks to this step's value; at 1 they come off."""
        if self.plan is None or self.masks is None:
            return
        self.masks.set(mask_value(self.plan, self.step))
        if not self.masks.installed:
            self.masks = None

    def _metrics(self, result: StepResult, lr: float) -> StepMetrics:
        device = current()
        per_device = self.budget.segments[-1].step_tokens / self.times[-1] / dist.get_world_size()
        tflops = per_device * training_flops_per_token(self.stage.model, self.run.data.sequence_length) / 1e12
        peak = _peak_tflops(self.stage.precision)
        return StepMetrics(
            stage=self.stage.name,
            step=self.step,
            tokens=self.budget.tokens_at(self.step),
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
        )

    def _at_intervals(self) -> None:
        if self._due(self.stage.stability.checksum_interval_steps):
            self._compare_replicas()
        if self._due(self.stage.validation.interval_steps) and self.validation:
            self._validate()
        if self._due(self.run.checkpoint.interval_steps) and self.step < self.budget.steps:
            self._save()
        if self.copies and self._due(self.copies.interval_steps) and self.step < self.budget.steps:
            self._copy(self.copies)

    def _compare_replicas(self) -> None:
        """Once in a step; where they differ, copies in memory that were made since the last time are worth nothing."""
        if self.compared_step != self.step:
            with self.meter.stall("replicas"), forgotten_on_error(self.copies):
                equal_step = max(self.compared_step, self.start.step)  # they are loaded from one place
                check_replicas(self.engine.chunks, self.step, equal_step)
            self.compared_step = self.step

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def _validate(self) -> None:
        """Loss of every validation set over the same samples in every stage and layout."""
        with self.meter.stall("validation"):
            losses = {name: self._validation_loss(stream) for name, stream in self.validation.items()}
        mean = sum(losses.values()) / len(losses)
        if self.log:
            tokens = self.budget.tokens_at(self.step)
            values = {"stage": self.stage.name, "step": self.step, "tokens": tokens, "val_loss": mean}
            self.log.record(values | {f"val_loss/{name}": loss for name, loss in losses.items()})
            parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self.log.say(f"{self.stage.name} step {self.step} | validation loss {mean:.4f} ({parts})")

    def _validation_loss(self, stream: Stream) -> float:
        stage = self.stage
        sizes = (stage.global_batch, stage.micro_batch, self.data_rank, self.data_size)
        return self.engine.validation_loss(validation_batches(stream, stage.validation.samples, *sizes))

    def _save(self) -> None:
        """Save this step if it is not saved yet, after the save before it is whole."""
        if self.saved_step == self.step:
            return
        self._finish_save()
        if self.stage.stability.checksum_interval_steps:
            self._compare_replicas()
        if self.log:
            self.log.sync()
        self.saved_path = self.store.new_path(self.stage.name, self.step, self.start.taken)
        with self.meter.stall("save"):
            self.pending = save_state(
                self.saved_path,
                self.engine.chunks,
                self.engine.optimizer,
                self._manifest(),
                self.run.checkpoint.asynchronous,
            )
        self.saved_step = self.step
        if not self.run.checkpoint.asynchronous:
            self._finish_save()

    def _copy(self, copies: MemoryCopies) -> None:
        """Keep this step in memory, and its metrics on the disk, which may outlive this host."""
        with self.meter.stall("copy"):
            if self.log:
                self.log.sync()
            line = copies.refresh(self.engine.chunks, self.engine.optimizer, self._manifest())
        if line and self.log:
            self.log.say(line)

    def _finish_save(self) -> None:
        """Wait for the save under way; when it is whole, drop checkpoints that are no longer wanted."""
        if self.pending is None:
            return
        with self.meter.stall("save"):
            self.pending.wait()
            self.pending = None
            if is_main_rank():
                wanted = self.run.checkpoint
                self.store.prune(self.stage.name, wanted.keep_last, wanted.keep_every_steps)

    def _manifest(self) -> dict[str, Any]:
        samples = self.budget.sample_at(self.step)
        adam_step = max((group.get("step", 0) for group in self.engine.optimizer.param_groups), default=0)
        position = StagePosition(self.step, samples, self.budget.tokens_at(self.step), adam_step)
        return {
            **stage_manifest(self.run, self.index, self.stage.model, position, self.growth),
            "history": history_to_json(self.start.history),
            "validation_sha256": self.validation_sha256,
            **self.earlier,
            "stability": self.watch.to_json(),
            "layout": asdict(self.stage.parallel) | {"world": dist.get_world_size()},
        }


def _watched(start: Start, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the spike guard remembers of a stage that resumes. Where batch, length or mixture change, losses and norms
    may change too: only the count of refused steps goes on then."""
    saved = manifest.get("stability") if start.resumes else None
    return {"skipped": saved["skipped"]} if saved and segment_begins(start) else saved


def _growth_record(beginning: Beginning) -> dict[str, Any] | None:
    """The growth that the stage began with, as its checkpoints keep it: plan, provenance, certificate."""
    growth = beginning.view.manifest.get("growth") if beginning.plan else None
    return certified(growth, beginning.certificate) if growth else None


def _masks(engine: Engine, plan: GrowthPlan | None, step: int) -> Any:
    """The growth masks that are not fully open at `step`; none where there are none."""
    from flm_megatron.model.masks import GrowthMasks

    if plan is None or not plan.masked or mask_value(plan, step) == 1:
        return None
    return GrowthMasks(engine.chunks, engine.stage.model, mask_plan(plan))


def _open_log(run: RunConfig, index: int, step: int) -> MetricsLog | None:
    """The main rank's log."""
    if not is_main_rank():
        return None
    names = [stage.name for stage in run.stages]
    return MetricsLog(Path(run.output), run.logging.tensorboard, names, names[index], step)


def _peak_tflops(precision: Literal["fp32", "bf16"]) -> float | None:
    hardware = find_hardware(current().hardware_name())
    return hardware.peak_tflops(precision) if hardware else None
