"""Run files for fine-tuning read as they stand, and the preset learns as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.config.loader import load_run, run_from_dict
from flm_megatron.config.presets import load_preset
from flm_megatron.data.streams.stage_streams import chat_passes
from flm_megatron.optim.learning_rate import group_learning_rates
from tests.support import REPOSITORY

EXAMPLES = REPOSITORY / "examples" / "sft"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_fine_tunings(path: Path) -> None:
    run = load_run(path)
    assert run.data.chat is not None and run.stages and all(stage.growth is None for stage in run.stages)


def test_the_preset_learns_all_of_52b_at_the_published_rate() -> None:
    stages = [load_preset("tele-flm-52b-sft"), load_preset("tele-flm-52b")]
    tuned, base = run_from_dict({"stages": [{"name": "a", **stages[0]}, {"name": "b", **stages[1]}]}).stages
    stage = replace(tuned, model=replace(base.model, vocab_size=80000))
    assert list(group_learning_rates(2.7e-5, stage).values()) == pytest.approx([2.7e-5] * 3)
    assert (stage.optimizer.lr, stage.optimizer.min_lr, stage.global_batch) == (2.7e-5, 1e-9, 1024)
    assert stage.schedule.kind == "linear" and stage.optimizer.weight_decay == 0.1


def test_the_second_stage_of_the_mixture_keeps_a_little_of_the_first() -> None:
    run = load_run(EXAMPLES / "two-stages.yaml")
    assert run.data.chat is not None
    passes = [chat_passes(run, run.data.chat, stage, ["special", "general"]) for stage in range(2)]
    assert passes == [[1.0, 0.0], [0.05, 1.0]]
