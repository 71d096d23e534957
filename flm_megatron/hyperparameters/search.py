"""Search of hyperparameters on a narrow model, from which muP carries them over to wide ones.

Without a grid eight values are drawn together, much as Tele-FLM's authors did: two peak learning rates and the final
one, three initial standard deviations, two multipliers. Each trial is a short run on the run file's own data; the best
is the lowest loss among the runs whose gradient norm does not keep rising, since such runs diverge more often.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.rules.distillation import require_no_teacher
from flm_megatron.config.schema import ParallelConfig, RunConfig, ScheduleConfig, StageConfig
from flm_megatron.data.streams.loader import batches
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.distributed.local_processes import end_with_parent
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.hyperparameters.coordinate_check import power_of_width, scaled_model
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.step import TrainState

OPTIMIZER_VALUES = ("lr", "matrix_lr", "min_lr")
MODEL_VALUES = ("matrix_init_std", "vector_init_std", "head_init_std", "input_mult", "output_mult")
DECAY = "weight_decay"
GRID_VALUES = (*OPTIMIZER_VALUES, DECAY, *MODEL_VALUES)
"""What a grid may vary; weight decay, often 0, is not drawn at random."""
WARMUP_FRACTION = 0.1
LARGEST_RISE = 0.3
MIN_STEPS = 4


@dataclass(frozen=True)
class SearchSettings:
    """How a search draws and trains: `trials` runs of `steps` steps of `global_batch` samples at width `width`.

    Each value is drawn log-uniformly between the run file's divided and multiplied by `spread`; the first trial
    takes the run file's own. With a `grid` (values by name, of GRID_VALUES) there is a trial for every combination
    instead, and what it does not name stays the run file's. `layers` replaces the model's number of layers. `jobs`
    processes train trials at the same time.
    """

    trials: int = 20
    steps: int = 100
    width: int | None = None
    layers: int | None = None
    global_batch: int = 8
    spread: float = 4.0
    seed: int = 1234
    grid: tuple[tuple[str, tuple[float, ...]], ...] = ()
    jobs: int = 1


@dataclass(frozen=True)
class Trial:
    """One run: the values it had, the mean loss of its last tenth, and how its gradient norm went.

    `rise` is the power of the step that the gradient norm follows over the second half: 0 is level. `key` is a digest
    of all that the run depends on.
    """

    number: int
    values: dict[str, float]
    loss: float
    rise: float
    key: str = ""

    @property
    def stable(self) -> bool:
        """Whether the loss is finite and the gradient norm does not keep rising."""
        return math.isfinite(self.loss) and self.rise <= LARGEST_RISE


@dataclass(frozen=True)
class Job:
    """One trial before it is run; it travels to another process."""

    number: int
    values: dict[str, float]
    run: RunConfig
    stage: StageConfig
    steps: int

    @property
    def key(self) -> str:
        """Digest of the data, the seed and the stage as it is trained."""
        text = json.dumps([asdict(self.run.data), self.run.seed, self.run.tokenizer, asdict(self.stage), self.steps])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def search(
    run: RunConfig, stage: StageConfig, settings: SearchSettings, known: Mapping[str, Trial] | None = None
) -> Iterator[Trial]:
    """Train every trial and give each as it ends; those in `known` (by key) are given without being run again.

    `run` is resolved (data and vocabulary known), `stage` is the one whose values are sought.

    Raises:
        RequestError: the stage does not use muP, its model cannot be made that wide, or a size is out of range.
    """
    if settings.trials < 1 or settings.steps < MIN_STEPS or settings.spread < 1:
        raise RequestError(
            f"trials {settings.trials}, steps {settings.steps}, spread {settings.spread}: a search needs at least "
            f"1 trial, {MIN_STEPS} steps and a spread of 1"
        )
    names = [name for name, _ in settings.grid]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"the grid names {twice[0]} twice: give all of its values at once")
    proxy = proxy_stage(run, stage, settings)
    jobs = [
        Job(number, values, run, with_values(proxy, values), settings.steps)
        for number, values in enumerate(draws(proxy, settings))
    ]
    known = known or {}
    ended = [job for job in jobs if job.key in known]
    yield from (replace(known[job.key], number=job.number, values=job.values) for job in ended)
    left = [job for job in jobs if job.key not in known]
    if settings.jobs == 1:
        yield from map(train, left)
        return
    with ProcessPoolExecutor(settings.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        for done in as_completed([pool.submit(train, job) for job in left]):
            yield done.result()


def draws(proxy: StageConfig, settings: SearchSettings) -> list[dict[str, float]]:
    """The values of every trial: all combinations of the grid, or the run file's own and random ones around them."""
    if settings.grid:
        names, values = zip(*settings.grid, strict=True)
        return [dict(zip(names, choice, strict=True)) for choice in itertools.product(*values)]
    own, generator = own_values(proxy), random.Random(settings.seed)
    drawn = [{n: _drawn(v, settings.spread, generator) for n, v in own.items()} for _ in range(settings.trials - 1)]
    return [own, *drawn]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The stable trial of the lowest loss; none if all are unstable."""
    return min((trial for trial in trials if trial.stable), key=lambda trial: trial.loss, default=None)


def lower_but_unstable(trials: Sequence[Trial]) -> Trial | None:
    """The unstable trial of the lowest finite loss, if that is below the best stable one's."""
    found = min((trial for trial in trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss, default=None)
    return None if found is None or found.stable else found


def proxy_stage(run: RunConfig, stage: StageConfig, settings: SearchSettings) -> StageConfig:
    """`stage` as a search trains it: narrow, on one process, over the search's own budget."""
    if not stage.model.mup.enabled:
        raise RequestError(
            f"stage {stage.name!r} does not use muP, so values found on a narrow model do not carry over; "
            "set model.mup.enabled to true"
        )
    require_no_teacher(stage, "a search runs")
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
        schedule=_short(stage.schedule, tokens),
        growth=None,
        shrink=None,
    )


def _short(schedule: ScheduleConfig, tokens: int) -> ScheduleConfig:
    """The same shape over a trial's `tokens`."""
    warmup = round(WARMUP_FRACTION * tokens)
    return replace(schedule, warmup_tokens=warmup, warmup_samples=None, decay_tokens=None, power_start_tokens=None)


def own_values(stage: StageConfig) -> dict[str, float]:
    """The eight values as the stage has them."""
    optimizer, model = stage.optimizer, stage.model
    values = {"lr": optimizer.lr, "matrix_lr": optimizer.matrix_lr or optimizer.lr, "min_lr": optimizer.min_lr}
    return values | {name: getattr(model, name) for name in MODEL_VALUES} | {"head_init_std": model.head_std}


def with_values(stage: StageConfig, values: Mapping[str, float]) -> StageConfig:
    """`stage` with these values in place; the final learning rate is kept below the peak."""
    optimizer: dict[str, Any] = {name: value for name, value in values.items() if name not in MODEL_VALUES}
    model: dict[str, Any] = {name: value for name, value in values.items() if name in MODEL_VALUES}
    changed = replace(stage.optimizer, **optimizer)
    changed = replace(changed, min_lr=min(changed.min_lr, changed.lr))
    return replace(stage, model=replace(stage.model, **model), optimizer=changed)


def _drawn(value: float, spread: float, generator: random.Random) -> float:
    return value * spread ** generator.uniform(-1, 1)


def train(job: Job) -> Trial:
    """Train one trial on this process."""
    with one_process():
        return _train(job)


def _train(job: Job) -> Trial:
    run, stage, steps = job.run, job.stage, job.steps
    alone = replace(run, stages=[stage])
    state = TrainState(stage, run.data.sequence_length)
    load_state(InitialCheckpoint(stage.model, run.seed), state.chunks, state.optimizer)
    feed = batches(SampleStream(run.data, run.seed, "train"), 0, stage.global_batch, stage.micro_batch, 0, 1)
    losses: list[float] = []
    norms: list[float] = []
    try:
        for step in range(1, steps + 1):
            tokens = step * stage.global_batch * run.data.sequence_length
            set_learning_rates(state.optimizer, stage, learning_rate(tokens, alone, 0))
            result = state.train_step(next(feed))
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                return Trial(job.number, job.values, math.inf, math.inf, job.key)
    finally:
        feed.close()
    half = steps // 2
    rise = power_of_width(range(half + 1, steps + 1), norms[half:])
    return Trial(job.number, job.values, fmean(losses[-max(1, steps // 10) :]), rise, job.key)
