"""Measures our own training step under a layout, on every process of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from flm_megatron import kernels
from flm_megatron.benchmarking.flops import hardware_flops_per_token, training_flops_per_token
from flm_megatron.benchmarking.parts import profile_parts
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.steps import Step, draw_weights, held_gib, slowest, synthetic_batches, timed
from flm_megatron.benchmarking.workload import Request, describe
from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware
from flm_megatron.distributed.channels import gathered
from flm_megatron.distributed.under_layout import run_under
from flm_megatron.distributed.world import is_main_rank
from flm_megatron.engine import parallel_state
from flm_megatron.json_text import Json
from flm_megatron.planner.cost.memory import GIB, all_rank_memory
from flm_megatron.planner.layout import CPU, CUDA, as_chosen, stage_workload
from flm_megatron.training.step import TrainState

PROGRAM = "flm_megatron"
LEARNING_RATE = 1e-5


def on_ranks(parallel: ParallelConfig, timeout_s: int, function: Callable[..., object], *args: object) -> Json:
    """The result of `function(*args)` on rank 0, called on every process of a layout.

    A launcher's processes are used if there are some, and all but rank 0 get None; else fresh ones are started here,
    without the memory of what ran before. The result and `args` have to be plain data or pickle.

    Raises:
        RequestError: the launcher's processes do not fit the layout.
        FlmError: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        run_under(parallel, _keep_result, path, function, args, timeout_s=timeout_s, in_fresh_processes=True)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _keep_result(path: Path, function: Callable[..., object], args: tuple[object, ...]) -> int:
    """In a world: call `function(*args)`; rank 0 writes what it returns to `path`."""
    result = function(*args)
    if is_main_rank():
        path.write_text(json.dumps(result), encoding="utf-8")
    return 0


def measure_training_step(request: Request) -> dict[str, object]:
    """Measure our training step, on each rank of a world under the stage's layout; a `Measurement` as plain data."""
    stage, sequence = request.stage, request.sequence_length
    kernels.use(kernels.choose(request.kernels))
    before = held_gib()
    state, step = state_step(stage, sequence)
    batches = synthetic_batches(stage, sequence, parallel_state.get_data_parallel_world_size())
    for _ in range(request.warmup):
        step(batches)
    current().reset_peak_memory()
    times = slowest([timed(step, batches) for _ in range(request.steps)])
    held = current().peak_memory_gib() - before
    parts = profile_parts(state.chunks, step, batches, request.profiled) if request.profiled else {}
    world = dist.get_world_size()
    return vars(
        replace(
            describe_measurement(PROGRAM, stage, sequence, world, times, slowest([held])[0]),
            planned_gib=planned_gib(request, world),
            parts_s=_mean(parts),
        )
    )


def state_step(stage: StageConfig, sequence_length: int) -> tuple[TrainState, Step]:
    """The state with random weights, and its training step."""
    from flm_megatron.optim.learning_rate import set_learning_rates

    state = TrainState(stage, sequence_length)
    for chunk in state.chunks:
        draw_weights(chunk)
    state.optimizer.reload_model_params()
    set_learning_rates(state.optimizer, stage, LEARNING_RATE)
    return state, lambda batches: state.train_step(batches).loss


def describe_measurement(
    program: str, stage: StageConfig, sequence_length: int, world: int, times: list[float], memory_gib: float
) -> Measurement:
    """A measurement with what follows from the stage: tokens and FLOPs of a step, and the device's peak."""
    hardware = find_hardware(current().hardware_name())
    return Measurement(
        program=program,
        layout=describe(replace(stage.parallel, data=world // stage.parallel.model_size)),
        processes=world,
        step_times_s=times,
        step_tokens=stage.global_batch * sequence_length,
        model_flops_per_token=training_flops_per_token(stage.model, sequence_length),
        hardware_flops_per_token=hardware_flops_per_token(stage, sequence_length),
        peak_tflops=hardware.peak_tflops(stage.precision) if hardware else None,
        memory_gib=memory_gib,
    )


def planned_gib(request: Request, world: int) -> float:
    """The planner's figure for the tensors of the process with the most memory, without the driver's share."""
    software = as_chosen({"cpu": CPU, "cuda": CUDA}[current().name], request.kernels)
    work = stage_workload(request.stage, request.sequence_length, world, software)
    return max(memory.total for memory in all_rank_memory(work)) / GIB


def _mean(parts: dict[str, float]) -> dict[str, float]:
    """Mean over all processes."""
    everyone = gathered(parts)
    return {part: sum(one[part] for one in everyone) / len(everyone) for part in parts}
