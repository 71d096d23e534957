"""Presets and example run files: published sizes, multipliers and learning rates come out as published."""

from __future__ import annotations

import math

import pytest

from flm_megatron.config.loader import load_run, run_from_dict
from flm_megatron.config.presets import load_preset, preset_names
from flm_megatron.config.rules import check
from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.model.parameters import EMBEDDING, FC2, QKV, parameter_count, parameter_specs
from flm_megatron.optim.learning_rate import group_learning_rates
from tests.support import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def _preset(name: str, vocab_size: int | None = None) -> StageConfig:
    stage = run_from_dict({"stages": [load_preset(name)]}, name).stages[0]
    if vocab_size:
        stage.model.vocab_size = vocab_size
    return stage


def _closed_form(model: ModelConfig) -> int:
    """L(4h^2 + 3hf + 2h) + 2Vh + h, of the Tele-FLM report's block."""
    layers, h, f, vocab = model.num_layers, model.hidden_size, model.ffn_hidden_size, model.vocab_size or 0
    return layers * (4 * h * h + 3 * h * f + 2 * h) + 2 * vocab * h + h


@pytest.mark.parametrize(
    ("name", "vocab_size", "published_millions"),
    [("tele-flm-proxy", 81920, 283.18), ("tele-flm-52b", 81920, 52_849), ("tele-flm-1t", 80000, 1_083_735)],
)
def test_parameter_counts_as_published(name: str, vocab_size: int, published_millions: float) -> None:
    model = _preset(name, vocab_size).model
    count = parameter_count(model)
    assert count == _closed_form(model)
    assert round(count / 1e6, 2 if published_millions < 1000 else 0) == published_millions


@pytest.mark.parametrize(
    ("name", "billions"), [("flm-16b", 16), ("flm-51b", 51), ("flm-101b", 101), ("tele-flm-102b", 102)]
)
def test_unpublished_counts_are_near_their_names(name: str, billions: int) -> None:
    stage = _preset(name)
    assert stage.model.kv_channels == 128
    assert parameter_count(stage.model) / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize(
    ("name", "factor", "logits"),
    [("tele-flm-52b", 32, 0.03125), ("tele-flm-102b", 40, 0.03125), ("tele-flm-1t", 80, 0.025)],
)
def test_width_factor_and_logit_multiplier(name: str, factor: int, logits: float) -> None:
    model = _preset(name).model
    assert (model.width_factor, model.logit_multiplier) == (factor, logits)


def test_52b_starts_and_learns_as_published() -> None:
    stage = _preset("tele-flm-52b")
    specs = parameter_specs(stage.model)
    assert specs[f"{QKV}.weight"].init_std == pytest.approx(4.242e-3, rel=1e-3)
    assert specs[f"{FC2}.weight"].init_std == pytest.approx(4.242e-3 / math.sqrt(128), rel=1e-3)
    assert specs[EMBEDDING].init_std == 4e-3
    assert group_learning_rates(stage.optimizer.lr, stage) == pytest.approx(
        {"matrix": 1.5e-4, "vocabulary": 1.5e-4, "vector": 1.5e-4}
    )
    assert stage.global_batch * 4096 == 5_505_024
    assert stage.schedule.warmup_samples == 2000 * stage.global_batch


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_satisfies_the_rules(name: str) -> None:
    run = run_from_dict({"stages": [{**load_preset(name), "name": name}]}, name)
    run.data.sequence_length = 128 if name.startswith("tiny") else 2048
    check(run, run.stages[0].parallel.model_size)


@pytest.mark.parametrize(
    ("file", "processes"),
    [
        ("tele-flm", 896),
        ("tele-flm-52b", 896),
        ("tele-flm-102b", 896),
        ("tele-flm-1t", 896),
        ("flm-101b", 192),
        ("tiny", 1),
    ],
)
def test_every_example_satisfies_the_rules_on_its_machine(file: str, processes: int) -> None:
    run = load_run(EXAMPLES / f"{file}.yaml")
    check(run, processes)
    assert all(stage.growth for stage in run.stages[1:])


def test_published_layouts() -> None:
    layouts = {name: _preset(name).parallel for name in preset_names()}
    published = {"flm-16b": (2, 1), "flm-51b": (4, 2), "flm-101b": (4, 4), "tele-flm-52b": (4, 2)}
    assert {name: (layouts[name].tensor, layouts[name].pipeline) for name in published} == published
