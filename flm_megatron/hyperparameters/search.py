"""Random search of hyperparameters on a narrow model, from which muP carries them over to wide ones.

Seven values are drawn together, as Tele-FLM's authors did: two peak learning rates and the final one, two initial
standard deviations, two multipliers. Each draw is a short run on the run file's own data; the best is the lowest
loss among the runs whose gradient norm does not keep rising, since such runs diverge more often.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import ParallelConfig, RunConfig, ScheduleConfig, StageConfig
from flm_megatron.data.streams.loader import batches
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.hyperparameters.coordinate_check import power_of_width, scaled_model
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.step import TrainState

OPTIMIZER_VALUES = ("lr", "matrix_lr", "min_lr")
MODEL_VALUES = ("matrix_init_std", "vector_init_std", "input_mult", "output_mult")
WARMUP_FRACTION = 0.1
LARGEST_RISE = 0.3
MIN_STEPS = 4


@dataclass(frozen=True)
class SearchSettings:
    """How a search draws and trains: `trials` runs of `steps` steps of `global_batch` samples at width `width`.

    Each value is drawn log-uniformly between the run file's divided and multiplied by `spread`; the first trial
    takes the run file's own. `layers` replaces the model's number of layers.
    """

    trials: int = 20
    steps: int = 100
    width: int | None = None
    layers: int | None = None
    global_batch: int = 8
    spread: float = 4.0
    seed: int = 1234


@dataclass(frozen=True)
class Trial:
    """One run: the values it had, the mean loss of its last tenth, and how its gradient norm went.

    `rise` is the power of the step that the gradient norm follows over the second half: 0 is level.
    """

    number: int
    values: dict[str, float]
    loss: float
    rise: float

    @property
    def stable(self) -> bool:
        """Whether the loss is finite and the gradient norm does not keep rising."""
        return math.isfinite(self.loss) and self.rise <= LARGEST_RISE


def search(run: RunConfig, stage: StageConfig, settings: SearchSettings) -> Iterator[Trial]:
    """Train every trial, one after the other on this process, and give each as it ends.

    `run` is resolved (data and vocabulary known), `stage` is the one whose values are sought.

    Raises:
        RequestError: the stage does not use muP, its model cannot be made that wide, or a size is out of range.
    """
    if settings.trials < 1 or settings.steps < MIN_STEPS or settings.spread < 1:
        raise RequestError(
            f"trials {settings.trials}, steps {settings.steps}, spread {settings.spread}: a search needs at least "
            f"1 trial, {MIN_STEPS} steps and a spread of 1"
        )
    proxy = proxy_stage(run, stage, settings)
    generator = random.Random(settings.seed)
    with one_process():
        for number in range(settings.trials):
            values = own_values(proxy)
            if number:
                values = {name: _drawn(value, settings.spread, generator) for name, value in values.items()}
            yield _train(number, values, run, with_values(proxy, values), settings)


def best(trials: list[Trial]) -> Trial | None:
    """The stable trial of the lowest loss; none if all are unstable."""
    return min((trial for trial in trials if trial.stable), key=lambda trial: trial.loss, default=None)


def proxy_stage(run: RunConfig, stage: StageConfig, settings: SearchSettings) -> StageConfig:
    """`stage` as a search trains it: narrow, on one process, over the search's own budget."""
    if not stage.model.mup.enabled:
        raise RequestError(
            f"stage {stage.name!r} does not use muP, so values found on a narrow model do not carry over; "
            "set model.mup.enabled to true"
        )
    base = stage.model.mup.base_hidden_size
    model = scaled_model(stage.model, settings.width or base, base, mup=True)
    tokens = settings.steps * settings.global_batch * run.data.sequence_length
    return replace(
        stage,
        model=replace(model, num_layers=settings.layers or model.num_layers),
        parallel=ParallelConfig(distributed_optimizer=False),
        micro_batch=math.gcd(stage.micro_batch, settings.global_batch),
        global_batch=settings.global_batch,
        tokens=tokens,
        schedule=ScheduleConfig(kind=stage.schedule.kind, warmup_tokens=round(WARMUP_FRACTION * tokens)),
        growth=None,
    )


def own_values(stage: StageConfig) -> dict[str, float]:
    """The seven values as the stage has them."""
    optimizer, model = stage.optimizer, stage.model
    values = {name: getattr(optimizer, name) or optimizer.lr for name in OPTIMIZER_VALUES}
    return values | {name: getattr(model, name) for name in MODEL_VALUES}


def with_values(stage: StageConfig, values: dict[str, float]) -> StageConfig:
    """`stage` with the seven values in place; the final learning rate is kept below the peak."""
    optimizer: dict[str, Any] = {name: values[name] for name in OPTIMIZER_VALUES}
    optimizer["min_lr"] = min(optimizer["min_lr"], optimizer["lr"])
    model: dict[str, Any] = {name: values[name] for name in MODEL_VALUES}
    return replace(stage, model=replace(stage.model, **model), optimizer=replace(stage.optimizer, **optimizer))


def _drawn(value: float, spread: float, generator: random.Random) -> float:
    return value * spread ** generator.uniform(-1, 1)


def _train(
    number: int, values: dict[str, float], run: RunConfig, stage: StageConfig, settings: SearchSettings
) -> Trial:
    alone = replace(run, stages=[stage])
    state = TrainState(stage, run.data.sequence_length)
    load_state(InitialCheckpoint(stage.model, run.seed), state.chunks, state.optimizer)
    feed = batches(SampleStream(run.data, run.seed, "train"), 0, stage.global_batch, stage.micro_batch, 0, 1)
    losses: list[float] = []
    norms: list[float] = []
    try:
        for step in range(1, settings.steps + 1):
            tokens = step * stage.global_batch * run.data.sequence_length
            set_learning_rates(state.optimizer, stage, learning_rate(tokens, alone, 0))
            result = state.train_step(next(feed))
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                return Trial(number, values, math.inf, math.inf)
    finally:
        feed.close()
    half = settings.steps // 2
    steps = range(half + 1, settings.steps + 1)
    return Trial(number, values, fmean(losses[-max(1, settings.steps // 10) :]), power_of_width(steps, norms[half:]))
