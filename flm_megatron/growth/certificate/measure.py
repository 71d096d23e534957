"""Measured at a boundary before a stage starts: layer distances, importance of units, and the certificate."""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import GrowthConfig, RunConfig, ShrinkConfig, StageConfig
from flm_megatron.growth.boundary import needs_distances, source_model
from flm_megatron.growth.certificate.certificate import certify, check_certificate
from flm_megatron.growth.certificate.forward import Layout
from flm_megatron.growth.certificate.text import run_tokens
from flm_megatron.growth.distance import distances_of, layer_distances
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.record import Certificate
from flm_megatron.growth.shrink.boundary import given_importance
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint
from flm_megatron.growth.shrink.choice import wanted_criteria
from flm_megatron.growth.shrink.importance import Importance
from flm_megatron.growth.shrink.measure import measure_importance


def boundary_distances(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, layout: Layout, tokens: torch.Tensor | None = None
) -> list[float] | None:
    """Distance of each old layer on `tokens` (by default the run's first validation samples).

    Runs on all processes of the world, outside any layout. None if layers are not chosen by distance.
    """
    if not needs_distances(run, stage_index):
        return None
    growth = run.stages[stage_index].growth or GrowthConfig()
    tokens = run_tokens(run, growth.distance_samples) if tokens is None else tokens
    model = source_model(source, run, stage_index)
    found = layer_distances(source, model, run.stages[stage_index], tokens[:, :-1], layout)
    return distances_of(found, growth.distance_metric)


def boundary_importance(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, layout: Layout, tokens: torch.Tensor | None = None
) -> Importance:
    """Importance of the units of `source`, of which a smaller stage keeps some: from the file that the run file names,
    else measured on `tokens` (by default the run's first validation samples).

    Runs on all processes of the world, outside any layout. Raises as `given_importance`.
    """
    if (given := given_importance(run, stage_index)) is not None:
        return given
    stage = run.stages[stage_index]
    shrink = stage.shrink or ShrinkConfig()
    tokens = run_tokens(run, shrink.samples) if tokens is None else tokens
    model = source_model(source, run, stage_index)
    return measure_importance(source, model, stage, tokens, layout, wanted_criteria(shrink))


def change_settings(stage: StageConfig) -> GrowthConfig | ShrinkConfig:
    """The settings of the change of shape that a stage begins with."""
    return stage.shrink or stage.growth or GrowthConfig()


def boundary_certificate(
    checkpoint: GrownCheckpoint | ShrunkCheckpoint,
    run: RunConfig,
    stage_index: int,
    layout: Layout,
    tokens: torch.Tensor | None = None,
) -> Certificate | None:
    """The certificate of a grown or shrunk checkpoint on `tokens` (by default the run's first validation samples).

    Runs on all processes of the world, outside any layout. None with 0 samples.

    Raises:
        FlmError: the loss changes by more than the run file allows.
    """
    stage = run.stages[stage_index]
    settings = change_settings(stage)
    if settings.certify_samples == 0 and tokens is None:
        return None
    tokens = run_tokens(run, settings.certify_samples) if tokens is None else tokens
    certificate = certify(checkpoint.source, checkpoint, checkpoint.plan, stage, tokens, layout)
    check_certificate(certificate, settings, stage_index)
    return certificate
