"""Staged runs, machines and their overrides, reports, and the command."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flm_megatron.cli import plan as command
from flm_megatron.cli.options.parser import Parser
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    ShrinkConfig,
    StageConfig,
)
from flm_megatron.config.schema.stage import Precision
from flm_megatron.device.hardware import known_hardware
from flm_megatron.errors import RequestError
from flm_megatron.planner.calibration import TimedProduct, fit_products, write_efficiency
from flm_megatron.planner.cost.matmul import matmul_time
from flm_megatron.planner.machine import TABLE, find_machine, override
from flm_megatron.planner.plan import plan_run
from flm_megatron.planner.report.plot import plot_memory
from flm_megatron.planner.report.text import run_text
from tests.support import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def small_run() -> RunConfig:
    """Two stages of 2 and 4 layers on 4 processes."""
    small = ModelConfig(num_layers=2, hidden_size=512, ffn_hidden_size=1344, num_attention_heads=4, vocab_size=1000)
    parallel = ParallelConfig(tensor=2, pipeline=2)
    stage = StageConfig(name="small", model=small, parallel=parallel, tokens=10_001, precision="bf16")
    large = replace(stage, name="large", model=replace(small, num_layers=4), tokens=5_000)
    return RunConfig(stages=[stage, large], data=DataConfig(sequence_length=128))


def flm_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    parser = Parser()
    command.add_arguments(parser)
    args, args_overrides = parser.parse_known_args(list(arguments))
    args.overrides = args_overrides
    assert command.run(args) == 0
    return capsys.readouterr().out


def test_a_stage_costs_its_whole_steps_on_all_accelerators() -> None:
    machine = find_machine("a800")
    plan = plan_run(small_run(), machine, 4)
    small = plan.stages[0]
    assert small.steps == 10  # 10,001 tokens at 1,024 a step
    assert small.cost.tokens == 10 * 1024
    assert small.cost.seconds == pytest.approx(10 * small.step.total)
    assert small.cost.gpu_hours == pytest.approx(4 * small.cost.seconds / 3600)
    assert small.cost.energy_mwh == pytest.approx(small.cost.gpu_hours * 810 / 1e6)
    assert small.cost.money == pytest.approx(small.cost.gpu_hours * 1.5)


def test_a_checkpoint_has_the_planned_size() -> None:
    """Against the table of tensors that a run starts from."""
    from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint

    for stage in plan_run(small_run(), find_machine("a800"), 4).stages:
        tensors = InitialCheckpoint(stage.work.model, 0, dtype=torch.bfloat16, optimizer=True).tensors
        held = sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors.values())
        assert stage.checkpoint_bytes == held


def test_timed_products_give_back_the_efficiencies_they_were_made_with(tmp_path: Path) -> None:
    machine = find_machine("h100")
    true = replace(machine, efficiency=replace(machine.efficiency, matmul=0.66, tile_overhead=160.0))
    shapes = [(4096, 4096, 4096), (8192, 8192, 1024), (2048, 8192, 8192), (8192, 1024, 8192)]
    timed = [TimedProduct(*shape, matmul_time(true, "bf16", *shape)) for shape in shapes]
    assert fit_products(machine, "bf16", timed) == (0.66, 160.0)
    write_efficiency(tmp_path / "here.yaml", "timed on one GPU", matmul=0.66, tile_overhead=160.0)
    assert override(machine, tmp_path / "here.yaml").efficiency == true.efficiency


def test_the_comparison_trains_all_tokens_at_the_last_size() -> None:
    plan = plan_run(small_run(), find_machine("a800"), 4)
    small, large = plan.stages
    assert plan.total.tokens == plan.from_scratch.tokens == small.cost.tokens + large.cost.tokens
    assert plan.from_scratch.seconds == pytest.approx(plan.total.tokens * large.step.total / 1024)
    assert plan.saving == pytest.approx(1 - plan.total.seconds / plan.from_scratch.seconds)
    assert 0 < plan.saving < 1


def test_a_plan_takes_less_than_a_second() -> None:
    """Of the processor, which other processes do not lengthen."""
    run = load_run(EXAMPLES / "tele-flm.yaml")
    start = time.process_time()
    assert run_text(plan_run(run, find_machine("a800"), 896))
    assert time.process_time() - start < 1


def test_every_known_accelerator_can_be_planned() -> None:
    assert set(TABLE) == {hardware.name for hardware in known_hardware()}
    for hardware in known_hardware():
        precision: Precision = "bf16" if hardware.bf16 else "fp32"
        run = small_run()
        stages = [replace(stage, precision=precision) for stage in run.stages]
        plan = plan_run(replace(run, stages=stages), find_machine(hardware.name), 4)
        assert plan.total.seconds > 0


@pytest.mark.parametrize("name", ["h1000", "tpu", ""])
def test_an_unknown_accelerator_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RequestError, match=r"unknown GPU .*; known are .*a800.*h100.*mi300x"):
        find_machine(name)


def test_a_hardware_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(
        "inter_gb_per_s: 12.5\nefficiency: {matmul: 0.5}\nhardware: {memory_gib: 40}\n"
        "software: {fused_weight_gradient: false}\n"
    )
    machine, before = override(find_machine("h100"), path), find_machine("h100")
    assert machine.inter_gb_per_s == 12.5
    assert machine.hardware.memory_gib == 40
    assert not machine.software.fused_weight_gradient
    assert machine.efficiency == replace(before.efficiency, matmul=0.5)
    assert machine.source == str(path)
    assert machine.intra_gb_per_s == before.intra_gb_per_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 3", "unknown field 'speed'; known are hardware, node_size"),
        ("efficiency: {matmull: 1}", "efficiency: unknown field 'matmull'; known are matmul"),
        ("intra_gb_per_s: fast", "intra_gb_per_s has to be a number of at least 0, not 'fast'"),
        ("node_size: 0", "node_size has to be above 0"),
        ("node_size: 2.5", "node_size has to be a whole number, not 2.5"),
        ("efficiency: 3", "efficiency has to be a mapping of fields, not 3"),
        ("software: {dropout: 3}", "dropout has to be true or false, not 3"),
        ("- 3", "has to be a mapping"),
        ("a: [", "cannot read hardware file"),
    ],
)
def test_a_wrong_hardware_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        override(find_machine("h100"), path)


def test_the_report_names_stages_savings_ranks_and_assumptions() -> None:
    run = small_run()
    assert "Not planned" not in run_text(plan_run(run, find_machine("a800"), 4))
    run.stages[1].distill = DistillConfig(run.stages[0].name)
    text = run_text(plan_run(run, find_machine("a800"), 4))
    assert f"Not planned: the teacher {run.stages[0].name} of stage {run.stages[1].name}" in text
    for part in ("small", "all at the last size", "Growing saves", "pipeline rank of stage large", "fragmentation"):
        assert part in text
    smaller = replace(run, stages=[replace(stage, growth=None, distill=None) for stage in run.stages[::-1]])
    smaller.stages[1] = replace(smaller.stages[1], shrink=ShrinkConfig())
    assert "Growing saves" not in run_text(plan_run(smaller, find_machine("a800"), 4))


def test_the_plot_has_a_panel_for_each_stage(tmp_path: Path) -> None:
    path = plot_memory(plan_run(small_run(), find_machine("a800"), 4), tmp_path / "memory.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_json_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(EXAMPLES / "tele-flm.yaml"), "--gpu", "a800", "--gpus", "896")
    data = json.loads(flm_plan(capsys, *arguments, "--json"))
    text = flm_plan(capsys, *arguments)
    assert [stage["name"] for stage in data["stages"]] == ["tele-flm-52b", "tele-flm-102b", "tele-flm-1t"]
    assert f"{data['stages'][0]['step_seconds']['total']:.2f}" in text
    assert len(data["stages"][2]["memory_bytes"]) == 28


def test_the_run_files_choice_for_head_and_loss_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    run = (str(EXAMPLES / "tele-flm-52b.yaml"), "--gpu", "a800", "--gpus", "64", "--json", "--kernels.head_and_loss")
    fused, separate = (
        json.loads(flm_plan(capsys, *run, asked))["stages"][0]["memory_bytes"][-1]["working"]
        for asked in ("fused", "separate")
    )
    assert separate > 1.2 * fused


def test_search_and_budget_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run = (str(EXAMPLES / "tele-flm-52b.yaml"), "--gpu", "h100", "--gpus", "64")
    searched = json.loads(flm_plan(capsys, *run, "--search", "--top", "3", "--json"))
    (stage,) = searched.values()
    assert len(stage["candidates"]) == 3
    assert stage["rejections"]
    budget = flm_plan(capsys, str(EXAMPLES / "tele-flm.yaml"), "--gpu", "a800", "--gpus", "896", "--budget", "2e6")
    assert "Best use of 2,000,000 GPU-hours" in budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "argument --gpus: 0 is below 1"),
        (("--gpus", "8", "--nodes-of", "0"), "argument --nodes-of: 0 is below 1"),
        (("--gpus", "7"), "7 processes do not divide.*; --search tries all layouts of 7 GPUs"),
        (("--gpus", "8"), "needs .* GiB.*; no layout of 8 GPUs fits; the smallest number of GPUs that fits is 16"),
        (("--gpus", "64", "--search", "--stages.0.global_batch", "0"), "global_batch is 0, give at least 1"),
        (("--gpus", "64", "--search", "--stages.0.model.num_layers", "-1"), "num_layers"),
        (("--gpus", "64", "--plot", "/nowhere/at/all.png"), "cannot draw to /nowhere/at/all.png"),
        (("--gpus", "64", "--plot", "memory.cake"), "--plot memory.cake is no picture"),
        (("--gpus", "64", "--stage", "nope"), "no stage is named 'nope'; the run has tele-flm-52b"),
    ],
)
def test_a_wrong_request_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        flm_plan(capsys, str(EXAMPLES / "tele-flm-52b.yaml"), "--gpu", "h100", *arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_vocabulary_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"give a size, such as --stages.0.model.vocab_size"):
        flm_plan(capsys, str(EXAMPLES / "quickstart.yaml"), "--gpu", "a100", "--gpus", "4", "--tokenizer", "nowhere")
