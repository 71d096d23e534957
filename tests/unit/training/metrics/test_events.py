"""The lines of `metrics.jsonl`: what is written of each kind, and that all of it comes back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.evaluation.report.history import read_history
from flm_megatron.growth.record import Certificate, Comparison
from flm_megatron.training.metrics import events
from flm_megatron.training.metrics.events import (
    ChangeEvent,
    EvaluationEvent,
    GrowthEvent,
    GrowthHealthEvent,
    Line,
    MetricsEvent,
    NewLevelEvent,
    OtherEvent,
    RefusedEvent,
    RestartEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
    line_of,
    line_text,
    parse_line,
    read_events,
    read_lines,
)
from flm_megatron.training.metrics.log import MetricsLog
from tests.fixtures import CHECKPOINT_V1
from tests.support import REPOSITORY

AT = ("small", 4, 512)
PLACE = '{"stage": "small", "step": 4, "tokens": 512'
STEP = StepEvent(*AT, 5.5, 0.7, 1e-3, 0.1, 1280.0, 0.25, None, 1.5, 60.0, 2)
STEP_TEXT = (
    ', "loss": 5.5, "grad_norm": 0.7, "lr": 0.001, "step_time_s": 0.1, "tokens_per_s_per_device": 1280.0, '
    '"tflops_per_device": 0.25, "mfu": null, "peak_memory_gib": 1.5, "eta_s": 60.0, "skipped_steps": 2'
)
CERTIFICATE = Certificate("small", True, 4, 32, (Comparison("fp32", 2e-6, 1e-6, 2.0, 3.0, 3.5),))
CASES: list[tuple[MetricsEvent, str]] = [
    (STEP, STEP_TEXT),
    (replace(STEP, extra={"grad_norm/layer_000": 0.5}), STEP_TEXT + ', "grad_norm/layer_000": 0.5'),
    (
        RefusedEvent(*AT, "loss is nan", "skip", ("web:1", "web:2")),
        ', "refused": "loss is nan", "policy": "skip", "samples": ["web:1", "web:2"]',
    ),
    (
        ValidationEvent(*AT, loss=5.0, by_set={"held-out": 4.5, "web": 5.5}),
        ', "val_loss": 5.0, "val_loss/held-out": 4.5, "val_loss/web": 5.5',
    ),
    (RestartEvent(*AT), ', "restart": true'),
    (
        ChangeEvent(*AT, "global_batch", 4, 8),
        ', "changed": {"what": "global_batch", "before": 4, "now": 8}',
    ),
    (
        GrowthEvent(*AT, CERTIFICATE),
        ', "certificate": {"stage": "small", "preserving": true, "samples": 4, "sequence_length": 32, "comparisons": ['
        '{"precision": "fp32", "max_difference": 2e-06, "rms_difference": 1e-06, "logit_std": 2.0, "loss_before": 3.0, '
        '"loss_after": 3.5}]}',
    ),
    (GrowthEvent(*AT, None), ', "certificate": null'),
    (GrowthEvent(*AT, None, (0.5, 0.25)), ', "certificate": null, "layer_distances": [0.5, 0.25]'),
    (NewLevelEvent(*AT, "loss 5 is a new level"), ', "new_level": "loss 5 is a new level"'),
    (
        GrowthHealthEvent(*AT, {"layer_000": {"update_old": 0.01, "update_new": 0.5}}),
        ', "growth_health": {"layer_000": {"update_old": 0.01, "update_new": 0.5}}',
    ),
    (
        EvaluationEvent(*AT, {"bits_per_byte/prose": 3.5}, (("def", " main"),)),
        ', "evaluation": {"bits_per_byte/prose": 3.5}, "completions": [{"prompt": "def", "text": " main"}]',
    ),
    (EvaluationEvent(*AT, {"completion/acc": 0.5}), ', "evaluation": {"completion/acc": 0.5}'),
    (SaveEvent(*AT, "checkpoints/small/step_00000004"), ', "saved": "checkpoints/small/step_00000004"'),
]


@pytest.mark.parametrize(("event", "text"), CASES, ids=lambda case: type(case).__name__)
def test_a_line_of_each_kind_is_written_and_comes_back(event: MetricsEvent, text: str) -> None:
    """The texts are what commits wrote that had no classes yet."""
    assert line_text(event) == PLACE + text + "}"
    assert parse_line(PLACE + text + "}") == event


def test_every_kind_has_a_case() -> None:
    assert {type(event) for event, _ in CASES} == set(events.KINDS) == set(MetricsEvent.__subclasses__())


def test_the_documentation_lists_the_keys_of_every_kind() -> None:
    page = (REPOSITORY / "docs" / "evaluation.md").read_text().partition("## The lines of metrics.jsonl")[2]
    assert re.findall(r"^\| `(\w+)`", page, re.M) == [kind.KEY for kind in events.KINDS]
    assert [name for name in events.STEP_NUMBERS if f"`{name}`" not in page] == []


def test_a_step_stays_a_step_whatever_hooks_record_with_it() -> None:
    values = {"restart": 1.0, "val_loss": 2.0, "perplexity": 200.0}
    event = replace(STEP, extra=values)
    assert parse_line(line_text(event)) == event


def test_a_loss_that_is_not_finite_comes_back() -> None:
    step = parse_line(line_text(replace(STEP, loss=math.nan, grad_norm=math.inf)))
    assert isinstance(step, StepEvent) and math.isnan(step.loss) and step.grad_norm == math.inf


@pytest.mark.parametrize(
    "values", [{**json.loads(PLACE + "}"), "later": [1, {"a": None}]}, {"mine": 3.0}, {}, {"stage": 7, "step": "x"}]
)
def test_a_kind_that_is_not_known_is_kept_as_it_is(values: dict[str, Any]) -> None:
    line = line_of(values)
    assert isinstance(line, OtherEvent) and not line.problem
    assert json.loads(line_text(line)) == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"loss": 1}', "no stage and no step and no tokens"),
        ('{"stage": 1, "step": 1, "tokens": 1, "restart": true}', "no name as stage"),
        ('{"stage": "a", "step": "1", "tokens": 1, "restart": true}', "no number as step"),
        (PLACE + ', "loss": "low"}', "no number as loss"),
        (PLACE + ', "loss": 1.0, "lr": null}', "no number as lr"),
        (PLACE + ', "val_loss": 1, "val_loss/a": null}', "no number as val_loss/a"),
        (PLACE + ', "growth_health": {"layer_000": {"update_old": "low"}}}', "no number as update_old"),
        (PLACE + ', "growth_health": [1]}', "no parts in growth_health"),
        (PLACE + ', "evaluation": 1}', "no numbers in evaluation"),
        (PLACE + ', "evaluation": {"a/acc": "high"}}', "no number as a/acc"),
        (PLACE + ', "evaluation": {}, "completions": [{"prompt": "def"}]}', "no prompts and texts in completions"),
        (PLACE + ', "certificate": null, "layer_distances": ["far"]}', "no numbers as layer_distances"),
        (PLACE + ', "changed": {"what": "x", "now": 1}}', "no before in changed"),
        (PLACE + ', "changed": 1}', "no what in changed"),
        (PLACE + ', "certificate": 1}', "no certificate that this program knows"),
        (PLACE + ', "certificate": {"comparisons": []}}', "no certificate that this program knows"),
    ],
)
def test_a_line_without_what_its_kind_has_says_so(text: str, problem: str) -> None:
    assert parse_line(text) == OtherEvent(json.loads(text), problem)


def test_lines_of_earlier_commits_are_read_as_they_were(tmp_path: Path) -> None:
    folder = CHECKPOINT_V1 / "output"
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    lines = read_lines(folder)
    assert [line_text(line) for line in lines] == rows
    values = [json.loads(row) for row in rows]
    losses = [(each["step"], each["loss"]) for each in values if "loss" in each]
    assert [(step.step, step.loss) for step in read_events(folder, StepEvent)] == losses and len(losses) == 8
    assert [event.by_set for event in read_events(folder, ValidationEvent)] == [
        {"held-out": each["val_loss/held-out"]} for each in values if "val_loss" in each
    ]


def test_the_first_step_lines_had_no_count_of_refused_steps() -> None:
    row = PLACE + STEP_TEXT.removesuffix(', "skipped_steps": 2') + "}"
    step = parse_line(row)
    assert isinstance(step, StepEvent) and step.skipped_steps == 0 and not step.extra


def test_torn_lines_and_values_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{PLACE}, "restart": true}}\n3\n[]\n{PLACE}, "los')
    assert read_lines(tmp_path) == [RestartEvent(*AT)]


def test_a_run_that_goes_on_keeps_lines_of_kinds_that_are_not_known(tmp_path: Path) -> None:
    """Those of later steps are dropped as all others are; one without a place cannot be of a later step."""
    rows = ['{"mine": 1}', PLACE + ', "later": 1}', PLACE.replace("4", "5") + ', "later": 1}']
    (tmp_path / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    log = MetricsLog(tmp_path, tensorboard=True, stages=["small"], stage="small", step=4)
    log.record({"of a hook": 1.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*rows[:2], '{"of a hook": 1.5}']


def test_a_report_takes_no_notice_of_kinds_that_are_not_known(tmp_path: Path) -> None:
    folder = CHECKPOINT_V1 / "output"
    (tmp_path / "run.yaml").write_text((folder / "run.yaml").read_text())
    known = (folder / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}\n' + known)
    found = read_history(tmp_path)
    written: list[Line] = [event for _, event in (*found.steps, *found.validations)]
    assert sorted(map(line_text, written)) == sorted(known.splitlines())
