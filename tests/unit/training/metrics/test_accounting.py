"""Budgets, FLOPs and the metrics files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.model.parameters import parameter_count
from flm_megatron.training.metrics.events import StepEvent, read_events
from flm_megatron.training.metrics.flops import training_flops_per_token
from flm_megatron.training.metrics.log import MetricsLog, duration, short, step_line
from flm_megatron.training.metrics.plot import cumulative_flops, plot_loss


def test_stages_follow_each_other_in_the_stream() -> None:
    run = RunConfig(
        data=DataConfig(sequence_length=10),
        stages=[StageConfig("a", tokens=95, global_batch=3), StageConfig("b", tokens=40, global_batch=4)],
    )
    first, second = stage_budgets(run)
    assert (first.steps, first.first_sample, first.end_sample) == (4, 0, 12)  # 95 tokens round up to 4 steps of 30
    assert (second.steps, second.first_sample, second.first_token) == (1, 12, 120)
    assert first.tokens_at(2) == 60 and second.tokens_at(1) == 160


def test_flops_are_six_per_weight_plus_half_the_attention() -> None:
    model = ModelConfig(
        num_layers=64, hidden_size=8192, ffn_hidden_size=21824, num_attention_heads=64, vocab_size=80000
    )
    matmul_weights = parameter_count(model) - 80000 * 8192 - (2 * 64 + 1) * 8192  # no embedding lookup, no norms
    attention = 6 * 64 * 4096 * 8192  # 12 L s h per token, halved for causality
    assert training_flops_per_token(model, 4096) == pytest.approx(6 * matmul_weights + attention, rel=1e-12)
    seen = sum(min(position + 1, 1024) for position in range(4096)) / 4096
    windowed = 6 * matmul_weights + attention * seen / 2048
    assert training_flops_per_token(replace(model, sliding_window=1024), 4096) == pytest.approx(windowed, rel=1e-4)
    assert training_flops_per_token(replace(model, sliding_window=5000), 4096) == training_flops_per_token(model, 4096)


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (1500, "1.5K"), (2.5e12, "2.5T"), (0.5, "0.5")])
def test_counts_are_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("value", "text"), [(42.4, "42s"), (61, "1m01s"), (7265, "2h01m"), (100000, "1d03h")])
def test_durations_are_short(value: float, text: str) -> None:
    assert duration(value) == text


def metrics(stage: str, step: int) -> StepEvent:
    """Any metrics of a step."""
    return StepEvent(stage, step, step * 100, 5.0 - step, 1.0, 1e-3, 0.1, 1000.0, 0.01, None, 1.0, 10.0)


def test_log_lines_show_unknown_mfu_as_not_available() -> None:
    assert "MFU n/a" in step_line(metrics("a", 1), 10)
    assert "a step 1/10" in step_line(metrics("a", 1), 10)


def test_steps_after_the_checkpoint_are_dropped_from_the_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=True, stages=["a", "b"], stage="a", step=0)
    for stage, steps in (("a", 3), ("b", 4)):
        for step in range(1, steps + 1):
            log.step(metrics(stage, step), steps, speak=True)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "b", "st')  # torn by a crash
    MetricsLog(tmp_path, tensorboard=False, stages=["a", "b"], stage="b", step=2).close()
    kept = [(step.stage, step.step) for step in read_events(tmp_path, StepEvent)]
    assert kept == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]
    assert list((tmp_path / "tensorboard").iterdir())
    assert plot_loss(tmp_path, ("unigram entropy", 4.5)).stat().st_size > 10_000
    flops = cumulative_flops(read_events(tmp_path, StepEvent))
    assert flops[:2] == pytest.approx([100 * 1e7, 200 * 1e7])  # 0.01 TFLOP/s / 1000


def test_metric_names_are_those_the_documentation_promises(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False, stages=["a"], stage="a", step=0)
    log.step(metrics("a", 1), 1, speak=False)
    log.close()
    promised = "stage step tokens loss grad_norm lr step_time_s tokens_per_s_per_device tflops_per_device mfu"
    promised += " peak_memory_gib eta_s skipped_steps"
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text())) == promised.split()
