"""A rehearsed step in seconds: beside the plan, and as the command shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.planner.cost.throughput import StepTime
from flm_megatron.planner.machine import find_machine
from flm_megatron.planner.plan import plan_stage
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.rehearsal.roles import global_rank, roles
from flm_megatron.planner.rehearsal.timing.step import SimulatedStep, simulate_step

A800 = find_machine("a800")
MODEL = ModelConfig(num_layers=2, hidden_size=8192, ffn_hidden_size=21824, num_attention_heads=64, vocab_size=80000)


def run_of(parallel: ParallelConfig, batch: int = 16, model: ModelConfig = MODEL) -> RunConfig:
    """A run of one stage in bf16 under a layout."""
    stage = StageConfig(model=model, parallel=parallel, global_batch=batch, precision="bf16", tokens=10**7)
    return RunConfig(data=DataConfig(sequence_length=4096), stages=[replace(stage, recompute="selective")])


def timing_of(run: RunConfig, gpus: int) -> tuple[SimulatedStep, StepTime]:
    """Its step on A800, of one rank of every role, and as planned."""
    (stage,) = run.stages
    found = roles(stage.model, stage.parallel)
    places = [global_rank(stage.parallel, gpus, role.pipeline_ranks[0]) for role in found]
    reports = [rehearse_rank(run, stage, place, gpus, machine=A800) for place in places]
    planned = plan_stage(stage, run.data.sequence_length, A800, gpus).step
    return simulate_step(found, reports, stage.parallel, gpus, A800), planned


@pytest.mark.parametrize(
    ("parallel", "gpus"),
    [
        pytest.param(ParallelConfig(tensor=4, pipeline=2, sequence=True), 8, id="tensor, sequence and pipeline"),
        pytest.param(ParallelConfig(tensor=2), 2, id="tensor", marks=pytest.mark.slow),
        pytest.param(
            ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
            4,
            id="virtual pipeline",
            marks=pytest.mark.slow,
        ),
        pytest.param(ParallelConfig(tensor=4, sequence=True), 16, id="replicas", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_is_planned(parallel: ParallelConfig, gpus: int) -> None:
    model = replace(MODEL, num_layers=2 * parallel.virtual_pipeline)
    step, planned = timing_of(run_of(parallel, model=model), gpus)
    slowest = step.ranks[-1]
    assert slowest.total == pytest.approx(step.seconds)
    assert step.seconds == pytest.approx(planned.total, rel=0.03)
    assert slowest.matmul == pytest.approx(planned.compute.matmul)
    assert slowest.attention == pytest.approx(planned.compute.attention)
    assert slowest.tensor == pytest.approx(planned.compute.tensor, rel=0.02)
    assert slowest.data == pytest.approx(planned.data, rel=0.05)


@pytest.mark.slow
def test_what_replicas_overlap_takes_what_is_planned() -> None:
    layout = ParallelConfig(tensor=4, pipeline=2, sequence=True, overlap_grad_reduce=True, overlap_param_gather=True)
    step, planned = timing_of(run_of(layout, batch=64), 32)
    assert step.seconds == pytest.approx(planned.total, rel=0.03)


@pytest.mark.slow
def test_gradients_of_the_first_pipeline_rank_are_reduced_beside_its_last_backward_pass() -> None:
    layout = ParallelConfig(tensor=4, distributed_optimizer=False)
    plain, _ = timing_of(run_of(layout), 16)
    beside, _ = timing_of(run_of(replace(layout, overlap_grad_reduce=True)), 16)
    assert 0 < beside.ranks[0].data < 0.7 * plain.ranks[0].data


def test_the_command_shows_the_step_and_refuses_what_the_memory_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = replace(MODEL, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, vocab_size=1000)
    run = run_of(ParallelConfig(pipeline=2), batch=3, model=small)
    Path("run.yaml").write_text(yaml.safe_dump(run_to_dict(run)))
    Path("tight.yaml").write_text("hardware: {memory_gib: 2.01}\n")
    asked = ["rehearse", "run.yaml", "--gpus", "2", "--workers", "1", "--gpu", "a800", "--hardware", "tight.yaml"]
    assert main([*asked, "--trace", "t.json", "--plot", "step.png"]) == 2
    said = capfd.readouterr()
    assert "seconds of a step on a800, 8 to a node" in said.out
    assert "t.json: all 3 micro-batches" in said.out
    assert "rank 0 (first) needs 2.1 GiB" in said.err and "a800 has 2.0" in said.err
    assert Path("step.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    forward = [(event["pid"], event["name"]) for event in events if event["name"].startswith("forward")]
    assert sorted(forward) == [(rank, f"forward {number}") for rank in range(2) for number in range(3)]
    sent = [event for event in events if event["name"] in ("activations", "gradients")]
    assert len(sent) == 2 * 3 and all(event["dur"] > 0 for event in sent)
