"""Coordinate check of the maximal-update parametrization (Yang et al., arXiv 2203.03466, appendix D.1).

The same shape is trained for a few steps at several widths. Under muP the size of what each module gives, and of
what its weight update adds to that, must not depend on the width; where it grows or shrinks as a power of the
width, a multiplier, an initial standard deviation or a learning rate does not follow the width as it should.
Everything measured is the training program's own: initial weights, multipliers, parameter groups, learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import (
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
)
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.hyperparameters.coordinate_probe import Probe
from flm_megatron.model.teleflm import TeleFLM
from flm_megatron.optim.learning_rate import set_learning_rates
from flm_megatron.training.step import TrainState

Quantity = Literal["activation", "update"]

DEFAULT_WIDTHS = (64, 128, 256, 512)
DEFAULT_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=4,
    vocab_size=256,
    input_mult=2.0,
    output_mult=2.0,
    matrix_init_std=0.1,
    vector_init_std=0.1,
)
# The head sums over the width and its weights do not shrink with it, so fresh logits fall with its root.
EXPECTED_SLOPES: dict[tuple[str, Quantity], float] = {("output_layer", "activation"): -0.5}


@dataclass(frozen=True)
class CheckSettings:
    """What a check trains: `model` at `widths`, for `steps` steps at learning rate `lr`, once for each seed.

    The first width is the base width. Each step sees the same `samples` x `sequence_length` random tokens: few, for
    an update adds up along one direction (and so shows its power of the width) the better the fewer tokens it serves.
    """

    model: ModelConfig = field(default_factory=lambda: replace(DEFAULT_MODEL))
    widths: tuple[int, ...] = DEFAULT_WIDTHS
    steps: int = 3
    seeds: int = 4
    lr: float = 2e-3
    samples: int = 2
    sequence_length: int = 8


@dataclass(frozen=True)
class Measurement:
    """Sizes of one module at each width: mean absolute `activation` at the start, or what the `update` adds to it.

    `slope` is the power of the width that the sizes follow, `expected` what it is under muP.
    """

    module: str
    quantity: Quantity
    sizes: tuple[float, ...]
    slope: float
    expected: float

    def holds(self, tolerance: float) -> bool:
        """Whether the size follows the width as muP says, up to `tolerance` in the power."""
        return abs(self.slope - self.expected) <= tolerance


def coordinate_check(settings: CheckSettings, mup: bool) -> list[Measurement]:
    """Sizes of every module against width, under muP or under the standard parametrization.

    Runs on one process, which must not have joined a world.

    Raises:
        RequestError: fewer than three widths, a width that heads of the model's size do not divide, or a tied head.
    """
    if settings.model.tie_embeddings:
        raise RequestError(
            "model.tie_embeddings is true: the coordinate check measures embedding and head apart; set it to false"
        )
    if len(set(settings.widths)) < 3:
        raise RequestError(f"widths {list(settings.widths)}: a slope needs at least three different widths")
    models = [scaled_model(settings.model, width, settings.widths[0], mup) for width in settings.widths]
    with one_process():
        runs = [[_sizes(model, settings, seed) for seed in range(settings.seeds)] for model in models]
    return [
        _measurement(key, settings.widths, [fmean(sizes[key] for sizes in seeds) for seeds in runs])
        for key in runs[0][0]
    ]


def scaled_model(model: ModelConfig, width: int, base_width: int, mup: bool) -> ModelConfig:
    """`model` at another width: more heads of the same size, the feed-forward layer in the same proportion.

    Raises:
        RequestError: the width is not a multiple of the head's channels and of the query groups.
    """
    channels = model.kv_channels
    per_group = model.num_attention_heads // model.query_groups
    if width % (channels * per_group):
        raise RequestError(
            f"width {width} is not a multiple of {channels} channels x {per_group} query heads per group; "
            "give other widths"
        )
    return replace(
        model,
        hidden_size=width,
        ffn_hidden_size=round(model.ffn_hidden_size * width / model.hidden_size),
        num_attention_heads=width // channels,
        num_query_groups=width // channels // per_group,
        head_dim=channels,
        mup=MupConfig(enabled=mup, base_hidden_size=base_width),
    )


def _measurement(key: tuple[str, Quantity], widths: Sequence[int], sizes: list[float]) -> Measurement:
    return Measurement(*key, tuple(sizes), power_of_width(widths, sizes), EXPECTED_SLOPES.get(key, 0.0))


def power_of_width(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Power p of the best fit size ~ width^p: the least-squares slope of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (widths, sizes))
    mean_x, mean_y = fmean(x), fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _sizes(model: ModelConfig, settings: CheckSettings, seed: int) -> dict[tuple[str, Quantity], float]:
    """Train one width and measure each module."""
    stage = StageConfig(
        model=model,
        parallel=ParallelConfig(distributed_optimizer=False),
        micro_batch=settings.samples,
        global_batch=settings.samples,
        optimizer=OptimizerConfig(lr=settings.lr, min_lr=0.0, clip_grad=0.0, eps=1e-12),
    )
    state = TrainState(stage, settings.sequence_length)
    load_state(InitialCheckpoint(model, seed), state.chunks)
    batch = _batch(model, settings, seed)
    probe = Probe(cast(TeleFLM, state.chunks[0].module))
    probe.start(batch["tokens"])
    for _ in range(settings.steps):
        set_learning_rates(state.optimizer, stage, settings.lr)
        state.train_step([batch])
    probe.end(batch["tokens"])
    return {
        **{(n, "activation"): x for n, x in probe.activations.items()},
        **{(n, "update"): x for n, x in probe.updates.items()},
    }


def _batch(model: ModelConfig, settings: CheckSettings, seed: int) -> dict[str, Tensor]:
    """One batch of random tokens, the same at every width."""
    assert model.vocab_size
    samples, length = settings.samples, settings.sequence_length
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, model.vocab_size, (samples, length + 1), generator=generator)
    return {
        "tokens": drawn[:, :-1].contiguous(),
        "labels": drawn[:, 1:].contiguous(),
        "position_ids": torch.arange(length).repeat(samples, 1),
        "loss_mask": torch.ones(samples, length),
    }
