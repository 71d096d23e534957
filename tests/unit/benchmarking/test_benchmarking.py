"""Figures of a benchmark, the layouts it sweeps, its division of a step into parts, its report, and bad requests."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flm_megatron.benchmarking.environment import commit
from flm_megatron.benchmarking.flops import hardware_flops_per_token
from flm_megatron.benchmarking.parts import mark, profile_parts
from flm_megatron.benchmarking.report import Report
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.timeline import _covered
from flm_megatron.benchmarking.workload import STACK_VOCABULARY, describe, layer_stack, local_layouts
from flm_megatron.cli.main import main
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Recompute
from flm_megatron.errors import RequestError

MODEL = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=512)
STAGE = StageConfig(name="small", model=MODEL, micro_batch=2, global_batch=8)
MEASURED = Measurement(
    program="flm_megatron",
    layout="tensor 2 x pipeline 1 x data 1",
    processes=2,
    step_times_s=[3.0, 1.0, 2.0, 2.0, 9.0],
    step_tokens=1000,
    model_flops_per_token=8e9,
    hardware_flops_per_token=10e9,
    peak_tflops=10.0,
    memory_gib=1.5,
    planned_gib=1.4,
    parts_s={"attention": 1.0, "idle": 3.0},
)
RUN = """
data: {sequence_length: 16}
stages:
  - {name: a, model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, vocab_size: 128}}
  - {name: b, model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, vocab_size: 128}}
"""


def test_rates_follow_from_the_median_step() -> None:
    assert MEASURED.step_time_s == 2.0
    assert MEASURED.tokens_per_s == 500.0
    assert MEASURED.tflops == pytest.approx(2.0)  # 500 tokens/s x 8 GFLOP on 2 devices
    assert MEASURED.mfu == pytest.approx(0.2)
    assert MEASURED.hfu == pytest.approx(0.25)
    assert MEASURED.spread == pytest.approx(0.25)  # quartiles 2 and 3


def test_an_unknown_device_has_no_utilisation() -> None:
    unknown = replace(MEASURED, peak_tflops=None)
    assert unknown.mfu is None
    assert unknown.hfu is None


def test_recomputation_adds_what_is_done_again() -> None:
    feed_forward = 2 * 4 * 3 * 64 * 96
    attention = 2 * 4 * 4 * 64 * 64 + 2 * 4 * 64 * 64  # matrices; two products over half of 64 keys
    model = 3 * (feed_forward + attention + 2 * 64 * 512)
    extra: dict[Recompute, int] = {"none": 0, "selective": feed_forward, "full": feed_forward + attention}
    for recompute, again in extra.items():
        assert hardware_flops_per_token(replace(STAGE, recompute=recompute), 64) == model + again


def test_all_layouts_that_fit_are_swept() -> None:
    fitting, rejected = local_layouts(STAGE, 64, 4)
    names = {describe(stage.parallel) for stage in fitting}
    assert {
        "tensor 1 x pipeline 1 x data 4",
        "tensor 2 + sequence x pipeline 2 (2 chunks) x data 1",
        "tensor 4 x pipeline 1 x data 1",
    } <= names
    assert any(line.startswith("tensor 1 x pipeline 4 (2 chunks) x data 1: ") for line in rejected)  # 4 layers
    assert len(names) == len(fitting)


def test_a_number_of_processes_that_no_layout_has_is_refused() -> None:
    with pytest.raises(RequestError, match="no layout of 7 processes fits stage 'small', such as "):
        local_layouts(STAGE, 64, 7)


def test_a_layer_stack_is_all_layers() -> None:
    from flm_megatron.model.parameters import parameter_count

    stage = layer_stack(replace(STAGE, parallel=ParallelConfig(pipeline=2, pipeline_layers=[1, 3])), 40)
    assert stage.parallel.pipeline_layers is None
    layers = 40 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    assert parameter_count(stage.model) == layers + 2 * STACK_VOCABULARY * 64 + 64


class SlowBackward(torch.autograd.Function):
    """The identity, whose backward pass takes `SECONDS`."""

    SECONDS = 0.3

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        """Sleeps."""
        time.sleep(SlowBackward.SECONDS)
        return gradients[0]


class SlowModule(nn.Module):
    """A linear module with a slow backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear of x [8, 8]."""
        return SlowBackward.apply(self.linear(x))


class Layered(nn.Module):
    """Modules under the names that a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention, self.mlp = nn.Linear(8, 8), SlowModule()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both in turn, the slow one recomputed in the backward pass."""
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.mlp, self.self_attention(x), use_reentrant=True)


def test_the_backward_pass_counts_to_the_part_whose_forward_it_belongs_to() -> None:
    model, pauses = Layered(), []

    def step(batches: list[dict[str, torch.Tensor]]) -> float:
        began = time.perf_counter()
        loss = model(torch.ones(8, 8)).sum()
        loss.backward()
        time.sleep(0.2)
        pauses.append(time.perf_counter() - began)
        return loss.item()

    parts = profile_parts([model], step, [], 2)
    assert parts["MLP"] > SlowBackward.SECONDS
    assert parts["idle"] > 0.2
    assert 0 < parts["attention"] < SlowBackward.SECONDS
    assert sum(parts.values()) == pytest.approx(sum(pauses) / 2, rel=0.1)


def test_marks_are_taken_off() -> None:
    from torch.distributed import Work

    model, wait = Layered(), Work.wait
    with mark([model]):
        assert Work.wait is not wait
        assert model.mlp._forward_hooks
    assert Work.wait is wait
    assert not model.mlp._forward_hooks
    assert not model.mlp._forward_pre_hooks


def test_time_that_several_kernels_cover_counts_once() -> None:
    assert _covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def report(**changes: Any) -> Report:
    """A report of one measurement."""
    return replace(Report("Throughput", STAGE, 64, 1000, {"hardware": "a device"}, [MEASURED]), **changes)


def test_a_report_is_written_as_text_data_and_picture(tmp_path: Path) -> None:
    paths = report(ratios={"transformers": 1.5}, notes=["not measured: torchtitan"]).write(tmp_path / "new", "bench")
    text, data, picture = (path.read_text() for path in paths)
    assert "| flm_megatron | tensor 2 x pipeline 1 x data 1 | 2 |" in text
    assert "| 20.0 % | 25.0 % | 1.5 | 1.4 |" in text
    assert "| transformers | 1.50 |" in text
    assert "| attention | 1 | 25.0 % |" in text
    assert "causal attention counted half" in text
    assert "- hardware: a device" in text
    found = json.loads(data)["measurements"][0]
    assert (found["mfu"], found["step_times_s"]) == (pytest.approx(0.2), MEASURED.step_times_s)
    assert "<svg" in picture


def test_more_processes_are_compared_with_one() -> None:
    one = replace(MEASURED, processes=1, step_times_s=[3.0], parts_s={})
    lines = report(measurements=[one, MEASURED]).markdown().splitlines()
    rows = [line for line in lines if line.startswith("| flm_megatron")]
    assert [row.split(" | ")[-1] for row in rows] == ["100.0 % |", "75.0 % |"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot write results to .*; give another --out"):
        report().write(tmp_path / "file", "bench")


def test_the_commit_is_that_of_the_code() -> None:
    folder = Path(__file__).parent
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = head.stdout.strip()[:12] or "unknown"
    assert commit().startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a run file to measure a stage of"),
        (["RUN"], "give --stage: the run has a, b"),
        (["RUN", "--stage", "c"], "no stage is named 'c'; the run has a, b"),
        (["RUN", "--stage", "a", "--compare", "gpt"], "--compare gpt: not a known program; known are transformers"),
        (["RUN", "--stage", "a", "--compare", "torchtitan,torchtitan"], "names torchtitan twice"),
        (["RUN", "--stage", "a", "--compare", "transformers", "--layouts", "1"], "do not go together"),
        (["RUN", "--stage", "a", "--compare", "transformers", "--stages.a.parallel.tensor", "2"], "on one process"),
        (["RUN", "--stage", "a", "--compare", "transformers", "--stages.a.recompute", "selective"], "selective"),
        (["RUN", "--stage", "a", "--compare", "transformers", "--stages.a.model.activation", "gelu"], "Llama block"),
        (["RUN", "--stage", "a", "--kernels.swiglu", "apex"], "kernels.swiglu: there is no apex implementation"),
        (["RUN", "--stage", "a", "--layouts", "3"], "no layout of 3 processes fits stage 'a'"),
        (["RUN", "--stage", "a", "--stages.a.parallel.tensor", "3"], "do not divide by parallel.tensor 3"),
        (["RUN", "--calibrate", "out.yaml"], "leave out a run file"),
        (["--calibrate", "no/folder/out.yaml"], "there is no folder no/folder"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert main(["bench", *(str(path) if argument == "RUN" else argument for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
