"""One rank of a stage through its life: built, loaded, one training step, saved; the real program, without values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron.checkpoint.sharding.model_state import load_state, stored_state
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.distributed.world import layout
from flm_megatron.engine import parallel_state
from flm_megatron.engine.optimizer import parts
from flm_megatron.engine.types import ReplicatedChunk
from flm_megatron.kernels.choice import choose, using
from flm_megatron.kernels.unlaunched import without_launches
from flm_megatron.optim.learning_rate import set_learning_rates
from flm_megatron.planner.rehearsal.ledger import Peak
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from flm_megatron.planner.rehearsal.stage_checkpoint import StageCheckpoint
from flm_megatron.planner.rehearsal.world import rehearsed_world
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
    read_regions: int
    read_bytes: int
    written_regions: int
    written_bytes: int

    @property
    def most_bytes(self) -> int:
        """The most that it held at any time."""
        return max(self.building.nbytes, self.peak.nbytes)

    def per_step(self, transfer: Transfer) -> float:
        """How often one of `transfers` is done in a step: those of micro-batches that were not run are counted too."""
        return self.micro_batches / self.ran if transfer.repeats else 1.0

    def traffic(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Count and bytes of a step's transfers by kind and number of ranks."""
        counts: Counter[tuple[str, int]] = Counter()
        sizes: Counter[tuple[str, int]] = Counter()
        for transfer in self.transfers:
            key = (transfer.kind, len(transfer.group))
            counts[key] += self.per_step(transfer)  # type: ignore[assignment]
            sizes[key] += self.per_step(transfer) * transfer.nbytes  # type: ignore[assignment]
        return {key: (round(counts[key]), round(sizes[key])) for key in counts}


def rehearse_rank(
    run: RunConfig, stage: StageConfig, rank: int, world: int, micro_batches: int | None = None
) -> RankReport:
    """Run one training step of `rank` of `world` processes; `stage` has its vocabulary.

    `micro_batches` is how many of the step's are run; without it as many as its memory grows over.

    Raises what the real rank would raise: RequestError for what the engine or a rule refuses, and errors of torch.
    """
    with rehearsed_world(rank, world), layout(stage.parallel, run.distributed.timeout_s):
        return _Rehearsal(run, stage, rank, world).report(micro_batches)


class _Rehearsal:
    def __init__(self, run: RunConfig, stage: StageConfig, rank: int, world: int) -> None:
        self.run, self.stage, self.rank, self.world = run, stage, rank, world
        self.recorder = Recorder()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def report(self, micro_batches: int | None) -> RankReport:
        """The rank's life, and what it came to."""
        stage, ledger = self.stage, self.recorder.ledger
        total = stage.global_batch // stage.micro_batch // parallel_state.get_data_parallel_world_size()
        pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        ran = min(total, micro_batches or needed_micro_batches(stage, pipeline_rank))
        with using(choose(self.run.kernels)), without_launches(), self.fake, self.recorder:
            ledger.moment = "building"
            state = TrainState(stage, self.run.data.sequence_length)
            checkpoint = self._load(state)
            steady, building = ledger.by_use(), ledger.begin_peak()
            self._step(state, ran)
            transfers, peak = tuple(self.recorder.transfers), ledger.peak
            _, stored = stored_state(state.chunks, state.optimizer)
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
            flops={name: count * total // ran for name, count in self.recorder.flops.items()},
            transfers=transfers,
            read_regions=checkpoint.regions,
            read_bytes=checkpoint.nbytes,
            written_regions=len(stored),
            written_bytes=sum(tensor.nbytes for _, _, tensor in stored),
        )

    def _load(self, state: TrainState) -> StageCheckpoint:
        """Weights and optimizer out of a checkpoint of the stage, and what all that is held is for."""
        ledger = self.recorder.ledger
        ledger.use, ledger.moment = "optimizer", "loading"
        checkpoint = StageCheckpoint(self.stage, self.fake)
        load_state(checkpoint, state.chunks, state.optimizer)
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
        ledger.use = "temporaries"
        self.recorder.transfers.clear()
        self.recorder.flops.clear()
        return checkpoint

    def _step(self, state: TrainState, micro_batches: int) -> None:
        ledger, recorder = self.recorder.ledger, self.recorder
        set_learning_rates(state.optimizer, self.stage, self.stage.optimizer.lr)
        config = state.chunks[0].config
        finalize = config.finalize_model_grads_func

        def finish(*arguments: object, **named: object) -> None:
            """What comes after the last micro-batch is done once."""
            recorder.micro_batched, ledger.moment = False, "gradients"
            finalize(*arguments, **named)
            ledger.moment = "optimizer step"

        batch = _batch(self.stage, self.run.data.sequence_length)
        config.finalize_model_grads_func = finish
        with _forward_passes(state.chunks, recorder):
            ledger.moment, recorder.micro_batched = "start of the step", True
            state.train_step([batch] * micro_batches)
        config.finalize_model_grads_func = finalize
        ledger.moment = "saving"


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


@contextmanager
def _forward_passes(chunks: Sequence[ReplicatedChunk], recorder: Recorder) -> Iterator[None]:
    """While the block runs, the ledger knows when a forward pass of a micro-batch begins and ends."""
    ledger, begun = recorder.ledger, [0]

    def begin(*_: object) -> None:
        """Before a chunk's forward pass."""
        begun[0] += 1
        ledger.moment = f"forward pass {begun[0]}"
        ledger.begin_forward()

    def end(*_: object) -> None:
        """After it: until the next one begins, what runs is a backward pass."""
        ledger.end_forward()
        ledger.moment = f"after forward pass {begun[0]}"

    def logits(_: object, __: object, output: tuple[torch.Tensor, object]) -> None:
        """The head's product."""
        ledger.classify(output[0], "logits")

    handles = []
    for chunk in chunks:
        handles += [chunk.register_forward_pre_hook(begin), chunk.register_forward_hook(end)]
        head = getattr(chunk.module, "output_layer", None)
        if head is not None:
            handles.append(head.register_forward_hook(logits))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient_buffers(chunks: Sequence[ReplicatedChunk]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        for buffer in chunk.buffers:  # type: ignore[attr-defined]
            yield buffer.grad_data
            if buffer.param_data is not None:
                yield buffer.param_data


def _batch(stage: StageConfig, sequence_length: int) -> Batch:
    """A micro-batch without values."""
    shape = (stage.micro_batch, sequence_length)
    ids = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "labels", "position_ids")}
    return {**ids, "loss_mask": torch.ones(shape)}
